"""Training with the loader against synthetic views: the command on tiny data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import e2e

SMALL = ["--backbone", "resnet18", "--size", "32", "--batch-size", "8", "--dim", "32", "--predictor-hidden", "8"]


def test_the_command(beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--repeats", "2", "--steps", "3", "--json", "e2e.json"]
    assert e2e.main(["--data", str(beton), *options, *SMALL, "--backend", "cpu"]) == 0
    loader, synthetic, stages = json.loads(Path("e2e.json").read_text())["results"]
    assert len(loader["images_per_s"]["values"]) == len(synthetic["images_per_s"]["values"]) == 2
    expected = [
        a / b for a, b in zip(loader["images_per_s"]["values"], synthetic["images_per_s"]["values"], strict=True)
    ]
    assert loader["of_synthetic"]["values"] == pytest.approx(expected)
    assert stages["ms_per_image"]["decode"] > 0 and stages["ms_per_image"]["network"] > 0
    assert stages["limit"] == min(stages["capacity"], key=stages["capacity"].get)
    out = capsys.readouterr().out
    assert "of synthetic" in out and "limit:" in out
    assert [p.name for p in tmp_path.iterdir()] == ["e2e.json"]  # no run folder


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture) -> None:
    assert e2e.main(["--data", "nowhere.beton"]) == 2
    assert "nowhere.beton does not exist" in capsys.readouterr().err
