"""python -m benchmarks.augment: it runs, its roofline is one, and nobody makes other views where nothing is random."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import augment
from benchmarks.augment import AugmentOptions, Work, make_rows, make_work, measure, real_crops, workloads
from benchmarks.common import Run, main
from loaders.views import View

MEAN, STD = (torch.tensor(x)[:, None, None] for x in (augment.MEAN, augment.STD))


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def work(beton: Path, workload: str, num_views: int = 2) -> Work:
    config = AugmentOptions(data=beton, images=8, batch_size=4, size=32, device="cpu", dtype="float32")
    view = workloads(32)[workload]
    return make_work(config, view, real_crops(config, view.size, num_views))


def views_of(contestant, work: Work, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """All views that a contestant makes of the first step."""
    if contestant is augment.kornia and importlib.util.find_spec("kornia") is None:
        pytest.skip("kornia is not installed")
    monkeypatch.setattr(Work, "through", lambda _self, step: step)
    return torch.cat(contestant(work)(work.crops[0], work.draws[0]))


def plain(work: Work) -> torch.Tensor:
    """The crops of the first step, only normalised."""
    return (torch.cat(work.crops[0]).float() / 255 - MEAN) / STD


everybody = pytest.mark.parametrize(
    "contestant", [augment.rows, augment.device, augment.kornia, augment.torchvision_v2], ids=lambda f: f.__name__
)


@everybody
@pytest.mark.parametrize("piece", [1, 3, 4])
def test_all_normalise_alike(contestant, piece: int, beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "PIECE_FLOATS", piece * 3 * 32 * 32)
    some = work(beton, "normalise")
    torch.testing.assert_close(views_of(contestant, some, monkeypatch), plain(some), atol=1e-4, rtol=0)


@everybody
@pytest.mark.parametrize("workload", ["gray", "solarize"])
def test_all_do_the_same_operation(contestant, workload: str, beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = work(beton, workload)
    ours, theirs = views_of(augment.rows, some, monkeypatch), views_of(contestant, some, monkeypatch)
    # Kornia's luma weights differ in the fourth digit; at the threshold of solarize one step may tip over.
    wrong = (ours - theirs).abs() > 2 / 255 / min(augment.STD)
    assert wrong.float().mean() < 0.01


@everybody
@pytest.mark.parametrize("workload", ["brightness", "contrast", "saturation", "hue", "blur", "byol-second"])
def test_all_do_something(contestant, workload: str, beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Views are whole, and are not the crops as they were."""
    some = work(beton, workload)
    views = views_of(contestant, some, monkeypatch)
    assert views.shape == (8, 3, 32, 32) and views.dtype == torch.float32
    assert 0.001 < (views - plain(some)).abs().mean() < 2


@pytest.mark.parametrize("piece", [1, 3, 32])
def test_torchvision_gets_the_share_of_the_batch(piece: int, beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However a batch of 20 is cut, a fifth of it turns gray."""
    monkeypatch.setattr(augment, "PIECE_FLOATS", piece * 3 * 32 * 32)
    config = AugmentOptions(data=beton, images=20, batch_size=20, size=32, device="cpu", dtype="float32")
    some = make_work(config, View(32, gray_p=0.2), real_crops(config, 32, 1))
    changed = (views_of(augment.torchvision_v2, some, monkeypatch) - plain(some)).abs().amax((1, 2, 3)) > 0.01
    assert changed.sum() == 4


def test_a_round_takes_all_its_steps(beton: Path) -> None:
    some = work(beton, "gray")
    assert (some.num_steps, some.num_views, some.bytes_per_view) == (2, 16, 3 * 32 * 32 * 5)
    seen = []
    some.through(lambda crops, draws: seen.append((crops, draws)))(0)
    assert len(seen) == 2 and seen[0][0][0] is some.crops[0][0] and seen[1][0][0] is some.crops[1][0]
    assert not torch.equal(seen[0][0][0], seen[1][0][0])


def test_ratios(beton: Path) -> None:
    some = work(beton, "gray")  # 16 views that have to move 15,360 bytes each
    buffer = 2 * augment.COPY_BYTES["cpu"]
    rate = buffer / 0.5  # one copy of the buffer takes half a second
    rows = make_rows("gray", 2, some, {"copy": [Run(9.0, 0.5)], "rows": [Run(9.0, 0.016)], "kornia": [Run(9.0, 0.032)]})
    copy, ours, kornia = rows
    assert copy["gb_per_s"]["median"] == pytest.approx(rate / 1e9)
    assert copy["ms_per_view"]["median"] == pytest.approx(1000 * 15360 / rate)
    assert ours["ms_per_view"]["median"] == pytest.approx(1.0)
    assert ours["views_per_s"]["median"] == pytest.approx(1000.0)
    assert ours["of_roofline"]["median"] == pytest.approx(15360 / rate / 0.001)
    assert kornia["over_ours"]["median"] == pytest.approx(2.0)


def test_the_command(beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out.json"
    flags = ["--images", "8", "--batch-size", "4", "--size", "32", "--repeats", "1", "--num-views", "1"]
    flags += ["--workloads", "gray", "cifar", "--skip", "kornia", "--device", "cpu", "--json", str(out)]
    assert main("augment", AugmentOptions, measure, ["--data", str(beton), *flags]) == 0
    content = json.loads(out.read_text())
    assert [(r["workload"], r["contestant"]) for r in content["results"]] == [
        (workload, who) for workload in ("gray", "cifar") for who in ("copy", "rows", "torchvision-v2")
    ]
    figures = {"size", "ms_per_view", "views_per_s", "gb_per_s", "of_roofline", "over_ours"}
    assert all(row.keys() == {"workload", "contestant", "num_views"} | figures for row in content["results"])
    assert content["options"]["dtype"] == "float32"
    assert "cifar" in capsys.readouterr().out


def test_bad_input(beton: Path, capsys: pytest.CaptureFixture) -> None:
    assert main("augment", AugmentOptions, measure, ["--data", str(beton), "--workloads", "blurr"]) == 2
    assert "unknown workload 'blurr', did you mean 'blur'?" in capsys.readouterr().err
    assert main("augment", AugmentOptions, measure, ["--data", str(beton), "--only", "corn"]) == 2
    assert "unknown contestant 'corn'" in capsys.readouterr().err


def test_kornia_is_skipped_by_name(beton: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(augment, "not_installed", lambda package, install: f"{package} is not installed: {install}")
    flags = ["--images", "4", "--batch-size", "4", "--size", "32", "--repeats", "1", "--num-views", "1"]
    flags += ["--only", "rows", "kornia", "--workloads", "gray", "--device", "cpu"]
    assert main("augment", AugmentOptions, measure, ["--data", str(beton), *flags]) == 0
    assert "without kornia: kornia is not installed: pip install kornia" in capsys.readouterr().out
