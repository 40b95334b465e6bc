"""Mixing and cold reads, small."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import common, disk
from loaders.order import page_order, random_order, sequential


def test_entropy_of_known_batches() -> None:
    label_N = np.array([0, 0, 0, 0, 1, 2, 3, 4])
    assert disk.batch_entropy([np.arange(4)], label_N) == 0
    assert disk.batch_entropy([np.array([0, 4, 5, 6])], label_N) == pytest.approx(2)
    assert disk.batch_entropy([np.arange(4), np.array([0, 4, 5, 6])], label_N) == pytest.approx(1)


def test_a_wider_window_mixes_better_and_file_order_not_at_all() -> None:
    label_N, page_N = disk.imagenet_like(num_classes=100, per_class=200, per_page=20)
    options = {"batch_size": 32, "seed": 0, "epoch": 0}
    narrow, wide = (disk.batch_entropy(page_order(page_N, window=window, **options), label_N) for window in (4, 64))
    best = disk.batch_entropy(random_order(len(label_N), **options), label_N)
    worst = disk.batch_entropy(sequential(len(label_N), 32), label_N)
    assert worst < 0.5 < narrow < wide < best + 0.01 and best > 4.5


def test_dropping_the_cache_drops_it(beton: Path) -> None:
    beton.read_bytes()
    assert disk.cached_share(beton) > 0.99
    common.drop_cache(beton)
    assert disk.cached_share(beton) <= 1  # a file system in memory keeps it


def test_the_command(beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "disk.json"
    arguments = ["--data", str(beton), "--batch-size", "8", "--repeats", "2", "--page-windows", "1", "--json", str(out)]
    assert common.main("disk", disk.DiskOptions, disk.measure, arguments) == 0
    results = json.loads(out.read_text())["results"]
    cold = {r["order"]: r for r in results if "cold_images_per_s" in r}
    assert list(cold) == list(disk.CONTESTANTS)
    for row in cold.values():
        assert len(row["cold_images_per_s"]["values"]) == 2 and row["cold_images_per_s"]["min"] > 0
    assert cold["random, no read-ahead"]["of_random_without_read_ahead"]["median"] == 1
    assert "class entropy" in capsys.readouterr().out
    assert common.main("disk", disk.DiskOptions, disk.measure, ["--data", str(beton), "--page-windows", "0"]) == 2
