"""Every method and add-on on a small data set: does it learn, and which of the papers' orderings show?

    python -m benchmarks.methods --data TRAIN.beton --val VAL.beton --out FOLDER [--only NAME ...]

Each row is a preset of fastssl-train (`fastssl-train --list imagenette`) in a process of its own with one thread:
ResNet-18 at 64 px, batch 32, MoCo v2's augmentation without blur, 8 view passes per image; small crops come on top. The
table shows kNN (k = 20) at random initialisation and at the end, and the std of normalised outputs against its healthy
value 1/sqrt(d). Finished runs in FOLDER are not repeated.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro

from fastssl.cli import run_command
from fastssl.config import schema as configs
from fastssl.config.presets import PRESETS
from fastssl.training import log as logs
from fastssl.training.build import make_method, make_views
from loaders.errors import UserError, unknown

# Runs of this many view passes per image; the presets' names end in the epochs.
ROWS = [name for name in PRESETS if "-imagenette-" in name and name.endswith(("-2ep", "-4ep"))]
COMMON = "--knn-every 0 --log-every 50 --workers 1"


@dataclass(kw_only=True)
class MethodsOptions:
    """Train every row, then print the table."""

    data: str = ""
    """Training images (.beton)."""
    val: str = ""
    """Labelled images to classify (.beton)."""
    out: Path = Path("runs/methods")
    """One run folder per row in it."""
    jobs: int = 2
    """Runs side by side, of one thread each."""
    only: list[str] = field(default_factory=list)
    """Rows to run. None given: all."""
    json: Path | None = None
    """Write the table to this file, too."""


def command(config: MethodsOptions, name: str) -> list[str]:
    """Arguments of fastssl-train for a row."""
    paths = ["--data", config.data, "--val", config.val, "--out", str(config.out / name)]
    return [name, *paths, *shlex.split(COMMON)]


def train(config: MethodsOptions, name: str) -> None:
    """Run a row, unless it is there already. Raises UserError with the end of what it said if it fails."""
    here = config.out / name
    if (here / "weights.safetensors").exists():
        return
    print(f"{name} ...", file=sys.stderr)
    arguments = [sys.executable, "-m", "fastssl.train", *command(config, name)]
    if here.exists():
        arguments.append("--overwrite")
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, env=one_thread, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{name} failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}")


def row(config: MethodsOptions, name: str) -> dict[str, object]:
    """The results of a finished run."""
    here = config.out / name
    run = configs.load_yaml(here / "config.yaml")
    with torch.device("meta"):
        method = make_method(run)
    entries = logs.read_metrics(here / logs.METRICS)
    knn = [e["knn"] for e in entries if "knn" in e]
    last = [e for e in entries if "loss" in e][-1]
    return {
        "method": run.model.method,
        "views": " + ".join(f"{num} x {px}" for px, num in Counter(make_views(run).sizes).items()),
        "epochs": run.optim.epochs,
        "kNN random": knn[0],
        "kNN end": knn[-1],
        "std": last["feature_std"],
        "healthy std": method.healthy_std,
        "seconds": round(last["seconds"]),
        "command": f"fastssl-train {name}",
    }


def markdown(rows: list[dict[str, object]]) -> str:
    """The rows as a table."""

    def text(value: object) -> str:
        return f"{value:.{4 if value < 1 else 1}f}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join(lines + ["| " + " | ".join(map(text, r.values())) + " |" for r in rows])


def main(argv: list[str] | None = None) -> int:
    """The console command. Returns the exit status."""

    def run(arguments: list[str]) -> int:
        config = tyro.cli(MethodsOptions, prog="benchmarks.methods", description=__doc__, args=arguments)
        if not config.data or not config.val:
            raise UserError("give --data TRAIN.beton and --val VAL.beton: both with labels")
        for name in config.only:
            if name not in ROWS:
                raise unknown("row", name, ROWS)
        names = config.only or ROWS
        with concurrent.futures.ThreadPoolExecutor(config.jobs) as pool:
            for future in [pool.submit(train, config, name) for name in names]:
                future.result()
        rows = [row(config, name) for name in names]
        print(f"each row with: --data {config.data} --val {config.val} --out FOLDER {COMMON}")
        print(markdown(rows))
        if config.json is not None:
            config.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        return 0

    return run_command("benchmarks.methods", run, argv)


if __name__ == "__main__":
    sys.exit(main())
