"""python -m tools.inspect_beton."""

from __future__ import annotations

from pathlib import Path

import pytest

from loaders.beton import Reader
from tools.inspect_beton import describe, main


def test_it_says_what_the_file_holds(beton: Path, capsys: pytest.CaptureFixture) -> None:
    rows = dict(describe(Reader(beton)))
    assert rows["samples"].startswith("48 (0 raw")
    assert rows["labels"] == "4 different, 12 to 12 images each"
    assert main([str(beton)]) == 0
    assert "48 (0 raw" in capsys.readouterr().out


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(tmp_path / "no.beton")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
