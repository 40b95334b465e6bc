"""Everything here that needs a GPU, in one command of less than nine minutes, and one record of what it showed.

    python -m benchmarks.gpu_suite [--data TRAIN.beton] [--out RECORD.md] [--minutes 9]

Parts, each a command of its own with a limit of time; one that fails or does not fit is named and the others go on:

    tests          python -m pytest -m gpu: conformance of all backends on the device, compiled augmentation against
                   plain, training in fp16, bf16 and fp32 with exact resume, no host sync in loader or step
    augment        views per second of the fused augmentation, against the memory's speed and kornia
    loader         views per second with the CPU's, DALI's and the resident decoder, beside the peers
    e2e            ResNet-50, FastSiam, 4 x 224 px: share of the speed on synthetic views, and what limits; with the
                   CPU's decoder, and as e2e-resident and e2e-dali with those
    e2e-resnet18   the same with a network that takes several times as many views

Parts whose package is missing are passed over by name.
Without --data it makes 512 pictures of ImageNet's size. The record goes to benchmarks/records/ unless --out says
otherwise. Where there is no CUDA device the command says so in one line, does nothing, and exits with status 0.
"""

from __future__ import annotations

import datetime
import io
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from rich.console import Console

from benchmarks.common import FILE_WIDTH, ROOT, machine
from fastssl.cli import run_command
from loaders.backends import dali
from loaders.beton import Writer
from loaders.errors import UserError

RECORDS = ROOT / "benchmarks" / "records"
LEAST_SECONDS = 10.0  # with less left, a part is not begun


@dataclass(kw_only=True)
class Config:
    """All checks and measurements that need a GPU; one record."""

    data: Path | None = None
    """Images (.beton), ImageNet originals best. None: 512 generated pictures of that size."""
    out: Path | None = None
    """The record. None: benchmarks/records/DATE-GPU-gpu-suite.md."""
    minutes: float = 9.0
    """Time for everything."""
    only: tuple[str, ...] = ()
    """These parts only."""


@dataclass(frozen=True)
class Part:
    """A command, and how many seconds it may take."""

    name: str
    command: tuple[str, ...]
    seconds: float
    missing: str | None = None  # why it cannot run here


@dataclass(frozen=True)
class Outcome:
    """What became of it."""

    part: Part
    status: str  # ok, passed over, failed, stopped, not begun; and why
    seconds: float
    output: str

    @property
    def fine(self) -> bool:
        return self.status.startswith(("ok", "passed over"))


def parts(data: Path) -> list[Part]:
    """What is to be done, the most important first."""
    module = (sys.executable, "-m")
    ours = ("--only", "cpu", "cpu-crops", "dali", "dali-crops", "resident", "resident-crops", "pil", "dali-full")
    e2e = (*module, "benchmarks.e2e", "fastsiam-imagenet-25ep", "--data", str(data), "--repeats", "3")
    step = ("--batch-size", "64", "--steps", "20")
    r18 = ("--backbone", "resnet18", "--batch-size", "128", "--steps", "20")
    return [
        Part("tests", (*module, "pytest", "-m", "gpu", "-rs", "-p", "no:cacheprovider"), 240),
        Part("augment", (*module, "benchmarks.augment", "--data", str(data), "--repeats", "5"), 100),
        Part("loader", (*module, "benchmarks.loader", "--data", str(data), "--workers", "8", *ours), 120),
        Part("e2e", (*e2e, *step, "--backend", "cpu"), 90),
        Part("e2e-resident", (*e2e, *step, "--backend", "resident"), 60),
        Part("e2e-dali", (*e2e, *step, "--backend", "dali"), 60, dali.Backend.missing(torch.device("cuda"))),
        Part("e2e-resnet18", (*e2e, *r18, "--backend", "cpu"), 60),
    ]


def run(part: Part, limit: float) -> Outcome:
    """One part, for at most `limit` seconds."""
    if part.missing:
        return Outcome(part, f"passed over: {part.missing}", 0.0, "")
    if limit < LEAST_SECONDS:
        return Outcome(part, "not begun: no time left", 0.0, "")
    start = time.monotonic()
    try:
        done = subprocess.run(
            part.command, cwd=ROOT, timeout=limit, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        status, output = "ok" if done.returncode == 0 else f"failed with status {done.returncode}", done.stdout
    except subprocess.TimeoutExpired as error:
        printed = error.stdout or b""
        output = printed.decode(errors="replace") if isinstance(printed, bytes) else printed
        status = f"stopped after {limit:.0f} s"
    return Outcome(part, status, time.monotonic() - start, output)


def make_pictures(path: Path, num: int = 512) -> None:
    """Pictures of ImageNet's size (500 x 375 px, about 110 KB), smooth with noise, in .beton."""
    rng = np.random.default_rng(0)
    with Writer(path, num) as writer:
        for i in range(num):
            coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            pixels = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=float)
            pixels += rng.normal(0, 14, pixels.shape)
            out = io.BytesIO()
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
            writer.add(out.getvalue(), 375, 500, i % 10)


def record(outcomes: list[Outcome], about: dict) -> str:
    """The record's text."""
    gpu, versions = about["gpu"], about["versions"]
    lines = [
        f"# GPU suite, {gpu['name'] if gpu else 'no GPU'}, {datetime.date.today()}",
        "",
        f"{about['cpu']}, {about['cores']} cores, {about['memory_gb']} GB; CUDA {gpu and gpu['cuda']}, capability "
        f"{gpu and gpu['capability']}; commit {about['commit']}; " + ", ".join(f"{k} {v}" for k, v in versions.items()),
        "",
        "| part | outcome | seconds |",
        "|---|---|---|",
        *(f"| {o.part.name} | {o.status} | {o.seconds:.0f} |" for o in outcomes),
        "",
    ]
    for o in outcomes:
        command = " ".join(("python", *o.part.command[1:]))
        lines += [f"## {o.part.name}", "", f"`{command}`", "", "```", o.output.strip()[-20_000:], "```", ""]
    return "\n".join(lines)


def suite(config: Config, console: Console) -> int:
    """All parts, one record. Returns the exit status: 1 if a part failed."""
    started = time.monotonic()
    about = machine()
    name = re.sub("[^A-Za-z0-9]+", "-", about["gpu"]["name"]).strip("-").lower()
    out = config.out or RECORDS / f"{datetime.date.today()}-{name}-gpu-suite.md"
    if not out.parent.is_dir():
        raise UserError(f"the folder {out.parent} of --out does not exist; make it first")
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        data = config.data or Path(folder) / "pictures.beton"
        if config.data is None:
            make_pictures(data)
        chosen = [p for p in parts(data.resolve()) if not config.only or p.name in config.only]
        if not chosen:
            names = ", ".join(p.name for p in parts(data))
            raise UserError(f"--only {' '.join(config.only)} leaves nothing to do; parts are: {names}")
        for part in chosen:
            left = 60 * config.minutes - (time.monotonic() - started)
            outcome = run(part, min(part.seconds, left))
            outcomes.append(outcome)
            console.print(f"{part.name}: {outcome.status} ({outcome.seconds:.0f} s)", highlight=False)
            console.print(outcome.output, highlight=False, markup=False)
            out.write_text(record(outcomes, about), encoding="utf-8")  # after each part: a machine may go away
    console.print(f"record: {out}", highlight=False)
    return int(not all(o.fine for o in outcomes))


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status."""

    def command(arguments: list[str]) -> int:
        config = tyro.cli(Config, prog="python -m benchmarks.gpu_suite", args=arguments)
        console = Console()
        if not console.is_terminal:
            console.width = FILE_WIDTH
        if not torch.cuda.is_available():
            console.print("no CUDA device: nothing to do")
            return 0
        return suite(config, console)

    return run_command("benchmarks.gpu_suite", command, argv)


if __name__ == "__main__":
    sys.exit(main())
