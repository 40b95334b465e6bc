"""All checks and measurements that need a GPU, in one command of less than nine minutes, with one record.

    python -m benchmarks.gpu_suite [--data TRAIN.beton] [--out RECORD.md] [--minutes 9]
    python -m benchmarks.gpu_suite --only cifar --cifar TRAIN.beton VAL.beton

Each part is a command of its own with a limit of time, the most important first. A part that fails or does not fit is
named, and the others go on. A second call with `--only NAMES` takes parts that did not fit into the first.

    tests          python -m pytest -m gpu: conformance of all backends on the device, compiled augmentation against
                   plain, training in fp16, bf16 and fp32 with exact resume, no host sync in loader or step
    step           ResNet-50, FastSiam, 32 x 4 x 224 px: ms, GB and rates, from eager fp32 to the compiled step and CUDA
                   graphs, beside lightly's FastSiam and SimSiam's loop (aim: compiled 1.3 x eager channels_last AMP)
    memory         the same step in fp16 alone on the card (aim: 11 GB at most, CUDA's own included)
    e2e            ResNet-50, FastSiam, 4 x 224 px, batch 64: share of the speed on synthetic views (aim: 0.98), and
                   what limits; with the CPU's decoder, and as e2e-resident and e2e-dali with those
    step-large     `step` with 128 images, without fp32
    augment        views per second of the fused augmentation, against the memory's speed and kornia
    e2e-peers      ResNet-50 against lightly's FastSiam and SimSiam's loop, each with its own DataLoader
    loader         views per second with the CPU's, DALI's and the resident decoder, beside the peers
    e2e-resnet18   e2e with a network that takes several times as many views
    step-others    `step` of ResNet-18, ResNet-34, MobileNetV2 and ViT-S/16: eager AMP and compiled
    cifar          with --cifar only, and beyond --minutes: fastsiam-cifar10-200ep from start to end, kNN and minutes

Parts whose package is missing are passed over by name. The lines "aim: ..." of all parts, with pass or FAIL, are at the
head of the record; a missed aim is a finding, not a failure of the suite. Without --data the suite makes 512 pictures
of ImageNet's size. The record goes to benchmarks/records/ unless --out says otherwise. Without a CUDA device the
command says so in one line and exits with status 0.
"""

from __future__ import annotations

import datetime
import io
import os
import re
import signal
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
from benchmarks.step import RATES, verdict
from fastssl.cli import run_command
from fastssl.training import log as logs
from loaders.backends import dali
from loaders.beton import Writer
from loaders.errors import UserError, unknown

RECORDS = ROOT / "benchmarks" / "records"
LEAST_SECONDS = 10.0  # with less left, a part is not begun
CIFAR_SECONDS = 1800.0
CIFAR_RUN = Path(tempfile.gettempdir()) / "fastssl-gpu-suite-cifar"
LIGHTLY_KNN = 90.6  # %, FastSiam after 200 epochs with ResNet-18, batch 128: lightly's table, in 164 minutes
CIFAR_MINUTES = 10.0


@dataclass(kw_only=True)
class SuiteOptions:
    """All checks and measurements that need a GPU; one record."""

    data: Path | None = None
    """Images (.beton), ImageNet originals best. None: 512 generated pictures of that size."""
    out: Path | None = None
    """The record. None: benchmarks/records/DATE-GPU-gpu-suite.md."""
    minutes: float = 9.0
    """Time for everything."""
    only: tuple[str, ...] = ()
    """These parts only."""
    cifar: tuple[Path, Path] | None = None
    """Training and validation images of CIFAR-10 (.beton): adds the part `cifar`, which takes more than --minutes."""


@dataclass(frozen=True)
class Part:
    """A command, and how many seconds it may take."""

    name: str
    command: tuple[str, ...]
    seconds: float
    missing: str | None = None  # why the part cannot run here
    own_time: bool = False  # seconds beyond --minutes


@dataclass(frozen=True)
class Outcome:
    """The outcome of a part."""

    part: Part
    status: str  # ok, passed over, failed, stopped, not begun; and why
    seconds: float
    output: str

    @property
    def fine(self) -> bool:
        return self.status.startswith(("ok", "passed over"))

    @property
    def aims(self) -> list[str]:
        """The lines about aims that it printed (`benchmarks.step.verdict`)."""
        return re.findall(r"^aim: (.+?)\s*$", self.output, re.MULTILINE)


def parts(data: Path, cifar: tuple[Path, Path] | None = None) -> list[Part]:
    """All parts, the most important first."""
    module = (sys.executable, "-m")
    ours = ("--only", "cpu", "cpu-crops", "dali", "dali-crops", "resident", "resident-crops", "pil", "dali-full")
    e2e = (*module, "benchmarks.e2e", "fastsiam-imagenet-25ep", "--data", str(data), "--repeats", "3")
    batch_64 = ("--batch-size", "64", "--steps", "20")
    peers = ("--batch-size", "32", "--steps", "10", "--backend", "cpu", "--peers", "lightly", "lightly-amp", "simsiam")
    r18 = ("--backbone", "resnet18", "--batch-size", "128", "--steps", "20")
    step, r50 = (*module, "benchmarks.step", "--data", str(data)), ("--backbones", "resnet50")
    large = ("--batch-size", "128", "--only", "amp", "one-pass", "compiled", "reduce-overhead", "lightly-amp", *RATES)
    alone = ("--precision", "fp16", "--only", "compiled", "--repeats", "1", "--card-gb", "11")
    networks = ("--backbones", "resnet18", "resnet34", "mobilenet_v2", "vit-s16", "--only", "amp", "compiled", *RATES)
    made = [
        Part("tests", (*module, "pytest", "-m", "gpu", "-rs", "-p", "no:cacheprovider"), 170),
        Part("step", (*step, *r50), 180),
        Part("memory", (*step, *r50, *alone), 90),
        Part("e2e", (*e2e, *batch_64, "--backend", "cpu"), 90),
        Part("e2e-resident", (*e2e, *batch_64, "--backend", "resident"), 60),
        Part("step-large", (*step, *r50, *large), 120),
        Part("augment", (*module, "benchmarks.augment", "--data", str(data), "--repeats", "5"), 100),
        Part("e2e-peers", (*e2e, *peers), 120),
        Part("loader", (*module, "benchmarks.loader", "--data", str(data), "--workers", "8", *ours), 120),
        Part("e2e-dali", (*e2e, *batch_64, "--backend", "dali"), 60, dali.Backend.missing(torch.device("cuda"))),
        Part("e2e-resnet18", (*e2e, *r18, "--backend", "cpu"), 60),
        Part("step-others", (*step, *networks), 240),
    ]
    if cifar:
        train, val = (str(path.resolve()) for path in cifar)
        run = ("--data", train, "--val", val, "--out", str(CIFAR_RUN), "--overwrite", "--knn-every", "50")
        # lightly's votes: 200 neighbours, temperature 0.1.
        knn = ("--knn-k", "200", "--knn-temperature", "0.1")
        command = (*module, "fastssl.train", "fastsiam-cifar10-200ep", *run, *knn)
        made.append(Part("cifar", command, CIFAR_SECONDS, own_time=True))
    return made


def run(part: Part, limit: float) -> Outcome:
    """One part, for at most `limit` seconds."""
    if part.missing:
        return Outcome(part, f"passed over: {part.missing}", 0.0, "")
    if limit < LEAST_SECONDS:
        return Outcome(part, "not begun: no time left", 0.0, "")
    start = time.monotonic()
    # A group of processes, so that no process of a part outlives the part.
    process = subprocess.Popen(
        part.command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=os.setpgrp
    )
    try:
        output, _ = process.communicate(timeout=limit)
        status = "ok" if process.returncode == 0 else f"failed with status {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        status = f"stopped after {limit:.0f} s"
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    if part.name == "cifar" and status == "ok":
        output += "\n".join(["", *cifar_aims(CIFAR_RUN)])
    return Outcome(part, status, time.monotonic() - start, output)


def cifar_aims(folder: Path) -> list[str]:
    """The results of a finished run on CIFAR-10, as aims."""
    entries = logs.read_metrics(folder / logs.METRICS)
    knn, minutes = max(e["knn"] for e in entries if "knn" in e), max(e.get("seconds", 0) for e in entries) / 60
    return [
        verdict("FastSiam, CIFAR-10, 200 epochs: kNN in %", knn, LIGHTLY_KNN),
        verdict("FastSiam, CIFAR-10, 200 epochs: minutes of training", minutes, CIFAR_MINUTES, at_most=True),
    ]


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
        *(f"- {o.part.name}: {aim}" for o in outcomes for aim in o.aims),
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


def suite(config: SuiteOptions, console: Console) -> int:
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
        all_parts = parts(data.resolve(), config.cifar)
        names = [p.name for p in all_parts]
        for name in config.only:
            if name not in names:
                raise unknown("part", name, names)
        chosen = [p for p in all_parts if not config.only or p.name in config.only]
        for part in chosen:
            left = 60 * config.minutes - (time.monotonic() - started)
            outcome = run(part, part.seconds if part.own_time else min(part.seconds, left))
            outcomes.append(outcome)
            console.print(f"{part.name}: {outcome.status} ({outcome.seconds:.0f} s)", highlight=False)
            console.print(outcome.output, highlight=False, markup=False)
            out.write_text(record(outcomes, about), encoding="utf-8")  # after each part: a machine may go away
    console.print(f"record: {out}", highlight=False)
    return int(not all(o.fine for o in outcomes))


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status."""

    def command(arguments: list[str]) -> int:
        config = tyro.cli(SuiteOptions, prog="python -m benchmarks.gpu_suite", args=arguments)
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
