"""Help texts flow: the line breaks of docstrings are not those of the terminal."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import tyro

from loaders.help_texts import flowing


@dataclass
class Inherited:
    first: int = 1
    """A text that
    goes on in a second line."""


@dataclass
class Options(Inherited):
    second: str | None = None
    """Another one,
    also in two."""
    third: int = 3


def test_lines_are_joined_and_nothing_else_changes(capsys: pytest.CaptureFixture) -> None:
    assert flowing(flowing(Options)) is Options
    with pytest.raises(SystemExit):
        tyro.cli(Options, args=["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "A text that goes on in a second line. (default: 1)" in shown
    assert "Another one, also in two. (default: None)" in shown
    assert tyro.cli(Options, args=["--second", "x", "--first", "2"]) == Options(2, "x", 3)
