"""python -m benchmarks.convert: it runs, compares times the right way round, and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import jpeg_bytes, photo

from benchmarks.common import Run, main
from benchmarks.convert import Bench, ConvertBenchmarkOptions, make_rows, measure, subset
from loaders import UserError
from loaders.beton import Reader


def run_command(*arguments: object) -> int:
    return main("convert", ConvertBenchmarkOptions, measure, list(map(str, arguments)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve JPEGs in three classes."""
    root = tmp_path_factory.mktemp("source") / "train"
    rng = np.random.default_rng(0)
    for i in range(12):
        path = root / "abc"[i % 3] / f"{i:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg_bytes(photo(rng, 40, 50)))
    return root


def test_the_subset_is_even_and_whole(folder: Path, tmp_path: Path) -> None:
    files = subset(folder, tmp_path / "some", 6)
    assert len(files) == 6 and {f.parent.name for f in files} == {"a", "b", "c"}
    assert all(f.read_bytes() == (folder / f.parent.name / f.name).read_bytes() for f in files)
    assert len(subset(folder, tmp_path / "all", 100)) == 12
    with pytest.raises(UserError, match="no class subfolders"):
        subset(folder / "a", tmp_path / "none", 6)


def test_everybody_makes_what_it_is_timed_for(folder: Path, tmp_path: Path) -> None:
    bench = Bench(ConvertBenchmarkOptions(data=folder), tmp_path)
    original = sorted(f.read_bytes() for f in folder.glob("*/*"))
    assert bench.bytes == sum(map(len, original))
    for name, make in bench.contestants(1).items():
        if name == "ffcv-writer":
            continue
        found = []

        def look(make=make, found=found) -> None:
            make()
            if bench.out.is_dir():
                found += [f.read_bytes() for f in bench.out.glob("*/*")]
            else:
                with Reader(bench.out) as reader:
                    found += [bytes(sample.jpeg) for sample in reader]

        run = bench.timed(look)(1)
        assert sorted(found) == original, name
        assert run.elapsed_s > 0
        assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "whole.beton", "whole.json"], name


def test_ratios() -> None:
    runs = {
        ("convert", 1): [Run(4.0, 2.0), Run(8.0, 2.0)],
        ("convert", 2): [Run(2.0, 2.0), Run(2.0, 2.0)],
        ("cp", 1): [Run(1.0, 0.5), Run(4.0, 0.5)],
        ("ffcv-writer", 2): [Run(20.0, 30.0), Run(10.0, 30.0)],
    }
    one, two, cp, ffcv = make_rows(runs, num=10, size=8_000_000)
    assert one["mb_per_s"]["values"] == [2.0, 1.0] and one["images_per_s"]["values"] == [2.5, 1.25]
    assert one["cpu_ms_per_image"]["median"] == 200.0
    assert one["speed_over_cp"]["values"] == [0.25, 0.5]  # slower than cp: below 1
    assert two["speed_over_cp"]["values"] == [0.5, 2.0]  # cp has no workers: the same one
    assert two["speed_over_ffcv-writer"]["values"] == [10.0, 5.0] and one["speed_over_ffcv-writer"] is None
    assert cp["speed_over_cp"]["median"] == 1.0 and ffcv["speed_over_cp-folder"] is None


@pytest.mark.parametrize("cold", [False, True])
def test_the_command(folder: Path, tmp_path: Path, cold: bool, capsys: pytest.CaptureFixture) -> None:
    out, before = tmp_path / "out.json", sorted(tmp_path.iterdir())
    arguments = ["--data", folder, "--scratch", tmp_path, "--repeats", "1", "--skip", "ffcv-writer"]
    arguments += ["--workers", "1", "2", "--images", "8"]
    assert run_command(*arguments, "--json", out, *(["--cold"] if cold else [])) == 0
    assert sorted(tmp_path.iterdir()) == [*before, out]
    content = json.loads(out.read_text())
    both = ("convert", "convert-no-verify")
    assert [(r["contestant"], r["workers"]) for r in content["results"]] == [
        *((name, 1) for name in (*both, "cp", "cp-synced", "cp-folder")),
        *((name, 2) for name in both),
    ]
    assert content["images"] == 8 and content["bytes"] > 0
    figures = {"mb_per_s", "images_per_s", "cpu_ms_per_image", "speed_over_cp"}
    assert all(figures <= row.keys() for row in content["results"])
    assert ("not in the page cache" in capsys.readouterr().out) == cold


@pytest.mark.ffcv
def test_ffcv_writer(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("ffcv")
    bench = Bench(ConvertBenchmarkOptions(data=folder), tmp_path)
    bench.ffcv_writer(1)
    with Reader(bench.out) as reader:
        assert len(reader) == 12


def test_bad_input(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run_command("--data", tmp_path / "none") == 2
    assert "is no folder" in capsys.readouterr().err
    assert run_command("--data", folder, "--only", "mv", "--scratch", tmp_path) == 2
    assert "unknown contestant 'mv'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_broken_source_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = tmp_path / "train" / "a"
    root.mkdir(parents=True)
    whole = jpeg_bytes(photo(np.random.default_rng(0), 40, 50))
    (root / "0.jpg").write_bytes(whole)
    (root / "1.jpg").write_bytes(whole[:100])
    assert run_command("--data", root.parent, "--repeats", "1") == 2
    assert "a/1.jpg" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["train"]
