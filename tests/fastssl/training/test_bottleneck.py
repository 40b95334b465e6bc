"""The bottleneck report: its arithmetic, and that training writes it."""

from __future__ import annotations

import pytest

from fastssl.training import bottleneck

STATS = {"read": 1.0, "decode": 12.0, "crop": 8.0, "augment": 0.0, "copy": 0.5, "device": 2.0, "wait": 3.0}


def report(**changes):
    options = {"images": 1000, "seconds": 100.0, "network_seconds": 90.0, "workers": 3, "on_gpu": True}
    stats = STATS | {"images": 1000} | changes.pop("stats", {})
    return bottleneck.report(stats, **(options | changes))


def test_ms_per_image_and_capacities() -> None:
    r = report()
    assert r.stages == pytest.approx(
        {"read": 1, "decode": 12, "crop": 8, "augment": 0, "copy": 0.5, "GPU augment": 2, "network": 90, "wait": 3}
    )
    assert r.capacity == pytest.approx(
        {
            "the network": 1000 / 90,
            "the loader's 3 threads": 1000 / 7,
            "the producer's thread": 2000,
            "augmentation on the GPU": 500,
        }
    )
    assert r.images_per_s == 10 and r.limit == "the network" and r.next_limit == "the loader's 3 threads"


def test_the_slowest_resource_is_the_limit() -> None:
    r = report(network_seconds=2.0, workers=1)
    assert r.limit == "the loader's 1 thread" and r.next_limit in ("the network", "augmentation on the GPU")
    r = report(network_seconds=1.0, workers=99)
    assert r.limit == "augmentation on the GPU"


def test_batches_made_ahead_are_counted_for_the_loader_alone() -> None:
    r = report(stats={"images": 2000})
    assert r.stages["decode"] == pytest.approx(6) and r.stages["network"] == pytest.approx(90)


def test_no_gpu_no_gpu_stage() -> None:
    r = report(on_gpu=False)
    assert "GPU augment" not in r.stages and "augmentation on the GPU" not in r.capacity


def test_the_lines_name_stages_limit_and_hours() -> None:
    stages, meaning = report().lines(7200.0)
    assert stages == (
        "ms per image: read 1.00  decode 12.00  crop 8.00  copy 0.500  GPU augment 2.00  network 90.00  wait 3.00"
    )
    assert meaning == (
        "limit: the network (11.1 images/s alone); next: the loader's 3 threads (143 images/s); 2h00m to go"
    )
