"""Training with the loader against training on synthetic views: what the data pipeline costs the whole.

    python -m benchmarks.e2e [PRESET] --data TRAIN.beton [--repeats 5] [--steps 20] [--json FILE] [OPTIONS]

One trainer takes steps in blocks, alternately on the loader's batches and on tensors that were made beforehand (the
`synthetic` backend, infinitely fast). Before each block some steps go uncounted, so that nobody lives on what was
prepared while the other one ran. 1.0 is a loader that costs nothing; it is followed by the bottleneck report of the
loader's blocks. OPTIONS, and PRESET, are those of fastssl-train. Nothing is written but --json.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.common import FILE_WIDTH, Report, figure, ratio, shown, spread, synchronize, write_json
from fastssl import bottleneck
from fastssl.arguments import parse
from fastssl.cli import run_command
from fastssl.train import Trainer
from loaders import Batch, Loader


@dataclass(kw_only=True)
class Config:
    """Steps per second with the loader and on synthetic views. All other options are those of fastssl-train."""

    repeats: int = 5
    """Blocks of each kind."""
    steps: int = 20
    """Steps per block."""
    json: Path | None = None
    """Write every single measurement to this file."""


def endless(loader: Loader) -> Iterator[Batch]:
    """The loader's batches, epoch after epoch."""
    epoch = 0
    while True:
        yield from loader.epoch(epoch, ahead=True)
        epoch += 1


def measure(config: Config, trainer: Trainer) -> Report:
    """Interleaved blocks of steps, seconds each, and what the loader did in its own."""
    loader = trainer.loader
    synthetic = Loader(
        trainer.reader,
        trainer.spec,
        batch_size=loader.batch_size,
        device=trainer.device,
        backend="synthetic",
        prefetch=len(loader.slots) - 1,
        dtype=loader.dtype,
    )
    clock = bottleneck.StepClock(trainer.device)
    seconds: dict[str, list[float]] = {"loader": [], "synthetic": []}
    taken = dict.fromkeys(loader.stats.snapshot(), 0.0)
    network = 0.0
    with synthetic:
        batches = {"loader": endless(loader), "synthetic": endless(synthetic)}
        for number in range(config.repeats + 1):
            for name in batches:
                for _ in range(len(loader.slots) + 1):
                    trainer._advance(next(batches[name]))
                synchronize()
                before, network_before, start = loader.stats.snapshot(), clock.take(), time.perf_counter()
                for _ in range(config.steps):
                    batch = next(batches[name])
                    with clock:
                        trainer._advance(batch)
                synchronize()
                if number == 0:  # compiles, warms up
                    continue
                seconds[name].append(time.perf_counter() - start)
                if name == "loader":
                    after = loader.stats.snapshot()
                    taken = {key: taken[key] + after[key] - before[key] for key in taken}
                    network += clock.take() - network_before
        for generator in batches.values():
            generator.close()
    images = config.steps * loader.batch_size
    rates = {name: [images / s for s in values] for name, values in seconds.items()}
    share = ratio(rates["loader"], rates["synthetic"])
    report = bottleneck.report(
        taken,
        images=images * config.repeats,
        seconds=sum(seconds["loader"]),
        network_seconds=network,
        workers=loader.workers,
        on_gpu=trainer.device.type == "cuda",
    )
    table = Table(title=f"training, {trainer.config.data.data}, backend {loader.backend.name}", title_justify="left")
    for column in ("views from", "images/s", "spread", "views/s", "of synthetic"):
        table.add_column(column, justify="left" if column == "views from" else "right")
    rows = []
    for name, values in rates.items():
        value = figure(values)
        of = share if name == "loader" else None
        views = f"{value['median'] * trainer.spec.K:,.0f}"
        table.add_row(name, shown(value), spread(value), views, "1" if of is None else f"{of['median']:.3f}")
        rows.append({"views_from": name, "images_per_s": value, "of_synthetic": of})
    hours = trainer.total_steps * loader.batch_size / report.images_per_s
    rows.append({"ms_per_image": report.stages, "capacity": report.capacity, "limit": report.limit})
    about = {"training": dataclasses.asdict(trainer.config), "hours_in_all": hours / 3600}
    return Report(rows, [table, *report.lines(hours)], about=about)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status."""

    def command(arguments: list[str]) -> int:
        config, rest = tyro.cli(
            Config,
            prog="python -m benchmarks.e2e",
            description="Training with the loader against training on synthetic views. All other options, and a "
            "preset as the first word, are those of fastssl-train.",
            args=arguments,
            return_unknown_args=True,
        )
        console = Console()
        if not console.is_terminal:
            console.width = FILE_WIDTH
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(parse([*rest, "--out", f"{folder}/none"]), Console(quiet=True))
            try:
                report = measure(config, trainer)
            finally:
                trainer.loader.close()
        for item in report.tables:
            console.print(item, highlight=False)
        if config.json is not None:
            write_json(config.json, "e2e", config, report)
        return 0

    return run_command("benchmarks.e2e", command, argv)


if __name__ == "__main__":
    sys.exit(main())
