"""What a .beton file holds: `python -m tools.inspect_beton FILE`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console

from fastssl.cli import run_command
from fastssl.training.log import table
from loaders.beton import Reader


@dataclass
class InspectOptions:
    """Print what a .beton file holds."""

    file: tyro.conf.Positional[Path]
    """The file."""


def describe(reader: Reader) -> list[tuple[str, str]]:
    """Rows (what, value) about a file: samples, fields, sizes, labels."""
    size, height, width = np.asarray(reader.size), np.asarray(reader.height), np.asarray(reader.width)
    labels, counts = np.unique(reader.label, return_counts=True)
    rows = [
        ("samples", f"{len(reader)} ({int((np.asarray(reader.mode) == 1).sum())} raw, the others JPEG)"),
        ("fields", ", ".join(str(f) for f in reader.fields)),
        ("page size", f"{reader.page_size / 2**20:g} MiB"),
    ]
    if len(reader):
        rows += [
            ("bytes per image", f"{size.mean():.0f} on average, {size.min()} to {size.max()}"),
            ("height x width", f"{np.median(height):.0f} x {np.median(width):.0f} px in the middle, "
                               f"{height.min()} x {width.min()} to {height.max()} x {width.max()}"),
            ("labels", f"{len(labels)} different, {counts.min()} to {counts.max()} images each"),
        ]  # fmt: skip
    if reader.classes:
        rows.append(("classes", ", ".join(reader.classes[:12]) + (" ..." if len(reader.classes) > 12 else "")))
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit status."""

    def command(arguments: list[str]) -> int:
        config = tyro.cli(InspectOptions, prog="python -m tools.inspect_beton", args=arguments)
        table(Console(), str(config.file), describe(Reader(config.file)))
        return 0

    return run_command("inspect_beton", command, argv)


if __name__ == "__main__":
    sys.exit(main())
