"""The cost of converting: fastssl-convert, the copies that no converter can beat, and FFCV's writer.

    python -m benchmarks.convert --data FOLDER [--images 10000] [--workers 1 2] [--cold] [--scratch DIR] [--json FILE]

FOLDER has class subfolders with JPEG files. A subset of it, evenly taken, is made of hard links (copies, if the disk
has none) in a scratch folder, where all outputs go as well: one disk for everybody. Every output is removed at once.

    convert             every JPEG decoded once, its bytes kept
    convert-no-verify   the same, its markers read only
    cp                  cp of one file of that many bytes: the .beton itself; its output stays in the page cache
    cp-synced           cp and then fsync: like the converter, it ends when the bytes are on the disk
    cp-folder           cp -r of the folder; its output stays in the page cache
    ffcv-writer         FFCV's DatasetWriter, mode jpg, on torchvision's ImageFolder: it decodes and encodes again;
                        tools/install_ffcv.sh. Its progress is polled every 0.1 s: use thousands of images

The sources are in the page cache (the first round, which is not counted, reads them), or with --cold thrown out of it
before every run. MB/s are of the JPEGs' own bytes and elapsed time; ratios above 1 mean faster than `cp`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks import common
from benchmarks.common import (
    Report,
    Run,
    chosen,
    drop_cache,
    figure,
    interleave,
    not_installed,
    ratio,
    spread,
    table,
    timed,
)
from loaders.convert.command import ConvertOptions, convert
from loaders.errors import UserError

BASELINES = ("cp", "cp-synced", "cp-folder", "ffcv-writer")  # whom every row is compared with
SINGLE = ("cp", "cp-synced", "cp-folder")  # they have no workers


@dataclass(kw_only=True)
class ConvertBenchmarkOptions(common.CommonOptions):
    """Options."""

    data: Path
    """Folder with class subfolders of JPEG files."""
    images: int = 10_000
    """Images to convert, at most."""
    batch_size: int = 1
    """Unused here, like the other options about views."""
    scratch: Path | None = None
    """Where the subset and the outputs go for a while; the folder above --data unless given."""
    cold: bool = False
    """Throw the sources out of the page cache before each run."""


def subset(source: Path, target: Path, num: int) -> list[Path]:
    """Link `num` files, evenly taken, of the class folders in `source` into class folders in `target`.

    Raises UserError if there is no JPEG.
    """
    files = sorted(p for p in source.glob("*/*") if p.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise UserError(f"{source} has no class subfolders with JPEG files: give --data a folder such as train/")
    made = []
    for i in np.unique(np.linspace(0, len(files) - 1, num=min(num, len(files))).round().astype(int)):
        path = target / files[i].parent.name / files[i].name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(files[i], path)
        except OSError:  # another disk, or one without hard links
            shutil.copyfile(files[i], path)
        made.append(path)
    return made


def sync(path: Path) -> None:
    """Wait until a file's bytes are on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


class Bench:
    """The folder, the file `cp` copies, and what each contestant does with them."""

    def __init__(self, config: ConvertBenchmarkOptions, scratch: Path):
        self.config, self.scratch = config, scratch
        self.folder, self.file, self.out = scratch / "images", scratch / "whole.beton", scratch / "out"
        self.files = subset(config.data, self.folder, config.images)
        self.bytes = sum(path.stat().st_size for path in self.files)
        self.convert(self.file, workers=None, verify=False)

    def convert(self, out: Path, *, workers: int | None, verify: bool) -> None:
        summary = convert(ConvertOptions(src=str(self.folder), out=out, workers=workers, verify=verify, overwrite=True))
        if summary.skipped:
            raise UserError("{}: {}; take it out, all contestants need whole images".format(*summary.skipped[0]))

    def contestants(self, workers: int) -> dict[str, Callable[[], None]]:
        """Name -> function that makes `self.out`."""
        return {
            "convert": lambda: self.convert(self.out, workers=workers, verify=True),
            "convert-no-verify": lambda: self.convert(self.out, workers=workers, verify=False),
            "cp": lambda: run("cp", self.file, self.out),
            "cp-synced": lambda: (run("cp", self.file, self.out), sync(self.out)),
            "cp-folder": lambda: run("cp", "-r", self.folder, self.out),
            "ffcv-writer": lambda: self.ffcv_writer(workers),
        }

    def ffcv_writer(self, workers: int) -> None:
        from ffcv.fields import IntField, RGBImageField
        from ffcv.writer import DatasetWriter
        from torchvision.datasets import ImageFolder

        fields = {"image": RGBImageField(write_mode="jpg"), "label": IntField()}
        with quiet():  # its progress bar
            DatasetWriter(str(self.out), fields, num_workers=workers).from_indexed_dataset(ImageFolder(self.folder))

    def timed(self, function: Callable[[], None]) -> Callable[[int], Run]:
        """A contestant whose preparation and cleaning up are not timed."""

        def measured(number: int) -> Run:
            run("sync", "-f", self.scratch)  # whatever the one before has left for the disk to do
            if self.config.cold:
                drop_cache(*self.files, self.file)
            try:
                return timed(lambda _number: function())(number)
            finally:
                shutil.rmtree(self.out) if self.out.is_dir() else self.out.unlink(missing_ok=True)
                for beside in self.scratch.glob("out*"):
                    beside.unlink()

        return measured


def run(*command: str | Path) -> None:
    """Run a command; UserError if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{command[0]} failed: {done.stderr.strip()}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep this process and its children from printing on stderr."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


def measure(config: ConvertBenchmarkOptions) -> Report:
    """Converting a folder: fastssl-convert, cp, and FFCV's writer, on the same images and the same disk."""
    scratch = config.scratch or config.data.resolve().parent
    if not config.data.is_dir():
        raise UserError(f"{config.data} is no folder; give --data a folder with class subfolders")
    if not os.access(scratch, os.W_OK):
        raise UserError(f"{scratch} cannot be written to; give a folder on the disk to measure with --scratch")
    with tempfile.TemporaryDirectory(dir=scratch, prefix="benchmark-convert-") as folder:
        bench = Bench(config, Path(folder))
        names = chosen(bench.contestants(1), config)
        report = Report([], [], about={"bytes": bench.bytes, "images": len(bench.files), "disk": str(scratch)})
        why = not_installed("ffcv", "run tools/install_ffcv.sh")
        if why and "ffcv-writer" in names:
            report.skipped["ffcv-writer"] = why
            names.remove("ffcv-writer")
        runs = {}
        for workers, name in itertools.product(config.workers, names):
            if name in SINGLE and workers != config.workers[0]:
                continue
            runs[name, 1 if name in SINGLE else workers] = bench.timed(bench.contestants(workers)[name])
        report.rows = make_rows(interleave(runs, config.repeats), len(bench.files), bench.bytes)
        report.tables = [shown_table(config, bench, report.rows)]
        return report


def make_rows(runs: dict[tuple[str, int], list[Run]], num: int, size: int) -> list[dict[str, Any]]:
    """Rows per contestant and number of workers, of rounds of `num` images of `size` bytes in all."""
    seconds = {key: [run.elapsed_s for run in measured] for key, measured in runs.items()}
    rows = []
    for (name, workers), measured in runs.items():
        own = seconds[name, workers]
        row: dict[str, Any] = {
            "contestant": name,
            "workers": workers,
            "mb_per_s": figure([size / s / 1e6 for s in own]),
            "images_per_s": figure([num / s for s in own]),
            "cpu_ms_per_image": figure([1000 * run.cpu_s / num for run in measured]),
        }
        for other in BASELINES:
            base = seconds.get((other, 1 if other in SINGLE else workers))
            row[f"speed_over_{other}"] = ratio(base, own) if base else None
        rows.append(row)
    return rows


def shown_table(config: ConvertBenchmarkOptions, bench: Bench, rows: Sequence[dict[str, Any]]) -> Table:
    """The figures for people."""
    cache = "sources not in the page cache" if config.cold else "sources in the page cache"
    return table(
        f"{len(bench.files):,} images, {bench.bytes / 1e6:,.1f} MB, {cache}",
        rows,
        {
            "contestant": "contestant",
            "workers": lambda row: str(row["workers"]),
            "MB/s": "mb_per_s",
            "min-max": lambda row: spread(row["mb_per_s"]),
            "images/s": "images_per_s",
            "CPU ms/image": "cpu_ms_per_image",
            **{f"x {other}": f"speed_over_{other}" for other in BASELINES},
        },
    )


if __name__ == "__main__":
    sys.exit(common.main("convert", ConvertBenchmarkOptions, measure))
