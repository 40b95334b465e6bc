"""python -m benchmarks.methods: rows are presets, finished runs are read and not repeated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.methods import ROWS, main
from fastssl import methods
from fastssl.config import presets
from fastssl.train import main as train
from fastssl.training.build import make_views


def test_every_method_has_a_row_and_rows_have_equal_view_passes() -> None:
    configs = [presets.load(name) for name in ROWS]
    assert {config.model.method for config in configs} == set(methods.available())
    for config in configs:
        large = [size for size in make_views(config).sizes if size == config.data.size]
        assert len(large) * config.optim.epochs == 8


def test_finished_runs_become_a_table(beton: Path, val_beton: Path, tmp_path: Path, capsys) -> None:
    name = "simsiam-imagenette-4ep"
    small = "--size 32 --batch-size 8 --max-steps 2 --log-every 1 --knn-k 5 --dim 16 --predictor-hidden 8"
    data = ["--data", str(beton), "--val", str(val_beton)]
    assert train([name, *data, "--out", str(tmp_path / name), *small.split()]) == 0
    capsys.readouterr()
    assert main([*data, "--out", str(tmp_path), "--only", name, "--json", str(tmp_path / "table.json")]) == 0
    (row,) = json.loads((tmp_path / "table.json").read_text())
    assert (row["method"], row["views"], row["epochs"]) == ("simsiam", "2 x 32", 4)
    assert row["healthy std"] == 0.25 and 0 < row["std"] < 0.5
    out = capsys.readouterr().out
    assert f"| simsiam | 2 x 32 | 4 | {row['kNN random']:.1f} | {row['kNN end']:.1f} |" in out
    assert out.rstrip().endswith(f"| fastssl-train {name} |")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--data x.beton", "--val"),
        ("--data x.beton --val y.beton --only simsam-imagenette-4ep", "did you mean 'simsiam-imagenette-4ep'"),
        ("--data none.beton --val y.beton --only dino-imagenette-4ep", "none.beton"),
    ],
)
def test_bad_input(arguments: str, words: str, tmp_path: Path, capsys) -> None:
    assert main([*arguments.split(), "--out", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err
