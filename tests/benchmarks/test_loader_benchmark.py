"""python -m benchmarks.loader: it runs, compares whom it should, and everybody does the work they are timed for."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import loaders
from benchmarks.common import CommonOptions, Run, figure
from benchmarks.contestants import Contestant, contestants, indices
from benchmarks.loader import compare, figures, main, measure
from loaders.beton import MODE_RAW, Reader, Writer

VIEWS, SIZE, BATCH = 2, 32, 16


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Contestants set the number of threads, in processes of their own; here they are called in this one."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def needs(contestant: Contestant) -> list[pytest.MarkDecorator]:
    """Marks of the libraries that a contestant needs."""
    name = contestant.name
    if "ffcv" in name:
        return [pytest.mark.ffcv, *([pytest.mark.slow] if contestant.whose == "peer" else [])]  # compiles for long
    return [pytest.mark.dali] if "dali" in name else []


@pytest.mark.parametrize("who", [pytest.param(c, id=c.name, marks=needs(c)) for c in contestants().values()])
def test_everybody_makes_all_views(who: Contestant, beton: Path) -> None:
    """Batches of K views of the right size, as many images as asked for, twice."""
    missing = who.missing(torch.device("cpu"))
    if missing:
        pytest.skip(missing)
    config = CommonOptions(data=beton, images=64, batch_size=BATCH, size=SIZE, device="cpu")  # the file has 48
    batches = who.build(config, VIEWS, 1)
    for number in range(2):
        images = 0
        for views in batches(number):
            assert len(views) == VIEWS
            dtype = torch.uint8 if who.stage == "crops" else torch.float32
            assert all(v.shape[1:] == (3, SIZE, SIZE) and v.dtype == dtype for v in views)
            images += BATCH if who.whose == "floor" else len(views[0])
        assert images == 64


@pytest.mark.parametrize(
    "name", ["pil", "torchvision-v2", "lightly", pytest.param("dali-full", marks=pytest.mark.dali)]
)
def test_peers_views_look_like_ours(name: str, beton: Path) -> None:
    """Same recipe: the moments of the peers' views are those of our loader's."""
    everybody = contestants()
    missing = everybody[name].missing(torch.device("cpu"))
    if missing:
        pytest.skip(missing)
    np.random.seed(0)
    config = CommonOptions(data=beton, images=48, batch_size=48, size=SIZE, device="cpu")

    def views(name: str) -> torch.Tensor:
        return torch.cat(
            [v.clone() for number in range(4) for b in everybody[name].build(config, 4, 1)(number) for v in b]
        )

    theirs, ours = views(name), views("cpu")
    assert theirs.shape == ours.shape
    assert (theirs.mean((0, 2, 3)) - ours.mean((0, 2, 3))).abs().max() < 0.1
    assert (theirs.std((0, 2, 3)) - ours.std((0, 2, 3))).abs().max() < 0.1


def test_the_file_is_gone_through_again(beton: Path) -> None:
    reader = Reader(beton)
    config = CommonOptions(data=beton, images=100, batch_size=16)
    assert indices(config, reader).tolist() == [*range(48), *range(48)]  # whole batches


def test_ratios() -> None:
    def row(name: str, stage: str, workers: int, cpu: list[float], rate: list[float]) -> dict:
        values = {"cpu_ms_per_view": figure(cpu), "views_per_s": figure(rate)}
        return {"contestant": name, "stage": stage, "workers": workers, **values}

    rows = [
        row("floor", "crops", 1, [1.0, 2.0, 1.0], [10.0, 10.0, 10.0]),
        row("cpu-crops", "crops", 1, [2.0, 2.0, 2.0], [1.0, 1.0, 1.0]),
        row("cpu", "views", 1, [4.0, 8.0, 4.0], [5.0, 4.0, 5.0]),
        row("cpu", "views", 2, [5.0, 5.0, 5.0], [10.0, 6.0, 9.0]),
        row("pil", "views", 1, [8.0, 32.0, 12.0], [1.0, 1.0, 1.0]),
        row("ffcv-crops", "crops", 1, [6.0, 6.0, 6.0], [1.0, 1.0, 1.0]),
    ]
    compare(rows)
    floor, crops, cpu, cpu2, pil, ffcv = rows
    assert crops["cpu_over_floor"]["values"] == [2.0, 1.0, 2.0]
    assert pil["cpu_over_floor"]["median"] == 12.0 and pil["cpu_over_ours"]["values"] == [2.0, 4.0, 3.0]
    assert ffcv["cpu_over_ours"]["median"] == 3.0  # of crops to crops
    assert cpu["cpu_over_ours"]["median"] == 1.0 and floor["cpu_over_ours"]["median"] == 0.5
    assert cpu2["cpu_over_floor"] is None  # no floor with two workers
    assert cpu2["scaling"]["values"] == [2.0, 1.5, 1.8] and cpu["scaling"] is None


def test_figures_are_per_view() -> None:
    result = figures([Run(2.0, 0.5), Run(4.0, 0.25)], num=100)
    assert result["cpu_ms_per_view"]["values"] == [5.0, 2.5]
    assert result["views_per_s"]["values"] == [50.0, 25.0]


def test_the_command(beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out.json"
    flags = ["--num-views", "2", "--size", "32", "--images", "16", "--batch-size", "8", "--repeats", "1"]
    arguments = ["--data", str(beton), *flags, "--only", "floor", "cpu", "--device", "cpu", "--json", str(out)]
    assert main("loader", CommonOptions, measure, arguments) == 0
    content = json.loads(out.read_text())
    assert [row["contestant"] for row in content["results"]] == ["floor", "cpu"]
    floor, cpu = content["results"]
    keys = {"contestant", "whose", "stage", "num_views", "workers", "first_batch_s", "start_s", "peak_rss_mb"}
    keys |= {"scaling", "cpu_ms_per_view", "views_per_s", "cpu_over_floor", "cpu_over_ours"}
    assert floor.keys() == cpu.keys() == keys
    ratio = cpu["cpu_ms_per_view"]["values"][0] / floor["cpu_ms_per_view"]["values"][0]
    assert cpu["cpu_over_floor"]["median"] == pytest.approx(ratio)
    assert cpu["views_per_s"]["median"] > 0 and cpu["peak_rss_mb"] > 50
    assert content["benchmark"] == "loader" and content["skipped"] == {}
    printed = capsys.readouterr().out
    assert "floor" in printed and "CPU ms/view" in printed


@pytest.mark.slow
def test_the_command_with_workers(beton: Path, tmp_path: Path) -> None:
    """A DataLoader's worker processes are counted, too."""
    out = tmp_path / "out.json"
    flags = ["--num-views", "1", "2", "--size", "32", "--images", "32", "--batch-size", "8", "--repeats", "1"]
    flags += ["--workers", "1", "2", "--only", "pil", "cpu", "--device", "cpu", "--json", str(out)]
    assert main("loader", CommonOptions, measure, ["--data", str(beton), *flags]) == 0
    rows = json.loads(out.read_text())["results"]
    assert [(r["num_views"], r["contestant"], r["workers"]) for r in rows] == [
        (k, name, workers) for k in (1, 2) for name in ("cpu", "pil") for workers in (1, 2)
    ]
    pil1, pil2 = rows[2], rows[3]
    assert pil2["scaling"]["values"] == [pil2["views_per_s"]["median"] / pil1["views_per_s"]["median"]]
    # Nearly all work is in the workers: without them next to nothing would be left.
    assert pil2["cpu_ms_per_view"]["median"] > 0.3 * pil1["cpu_ms_per_view"]["median"]


def test_missing_peers_are_skipped_by_name(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    out = tmp_path / "out.json"
    arguments = ["--data", str(beton), "--only", "lightly", "ffcv-per-view", "--json", str(out)]
    assert main("loader", CommonOptions, measure, arguments) == 0
    content = json.loads(out.read_text())
    assert content["results"] == [] and content["skipped"].keys() == {"lightly", "ffcv-per-view"}
    assert "pip install --no-deps lightly" in content["skipped"]["lightly"]
    assert "without ffcv-per-view: ffcv is not installed: run tools/install_ffcv.sh" in capsys.readouterr().out


def test_bad_input(beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main("loader", CommonOptions, measure, ["--data", str(beton), "--only", "pill"]) == 2
    assert "unknown contestant 'pill', did you mean 'pil'?" in capsys.readouterr().err
    with Writer(tmp_path / "raw.beton", 1) as writer:
        writer.add(bytes(4 * 4 * 3), 4, 4, 0, MODE_RAW)
    assert main("loader", CommonOptions, measure, ["--data", str(tmp_path / "raw.beton")]) == 2
    assert "holds raw images" in capsys.readouterr().err


def test_ours_are_all_backends() -> None:
    names = set(contestants())
    for backend in loaders.backends.available():
        assert backend in names and (f"{backend}-crops" in names) == (backend != "synthetic")
