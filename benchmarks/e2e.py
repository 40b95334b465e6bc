"""Training with the loader against training on synthetic views, and against others' training with their loaders.

    python -m benchmarks.e2e [PRESET] --data TRAIN.beton [--repeats 5] [--steps 20] [--json FILE] [OPTIONS]
    python -m benchmarks.e2e --method fastsiam --data TRAIN.beton --peers lightly lightly-amp simsiam

One trainer takes steps in blocks, alternately on the loader's batches and on tensors that were made beforehand (the
`synthetic` backend, infinitely fast). Before each block some steps go uncounted, so that nobody lives on what was
prepared while the other one ran. 1.0 is a loader that costs nothing; it is followed by the bottleneck report of the
loader's blocks. OPTIONS, and PRESET, are those of fastssl-train. Nothing is written but --json.

--peers adds blocks of other people's training (benchmarks/peers.py) of the same backbone on the same JPEGs at the same
size and batch size, each with the DataLoader and the transforms of its users (benchmarks/contestants.py), with
--peer-workers processes, and a step that does what theirs does. Images come from the page cache in file order. SimSiam
makes and trains on two views of an image, so speeds are compared in views/s. When a block of theirs ends, their
workers finish what they have begun before anybody else starts.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.common import FILE_WIDTH, Report, figure, ratio, shown, spread, synchronize, write_json
from benchmarks.peers import PEERS, Peer
from benchmarks.step import verdict
from fastssl.cli import run_command
from fastssl.config.command_line import parse
from fastssl.training import bottleneck
from fastssl.training.trainer import Trainer
from loaders import Loader
from loaders.errors import UserError, unknown

LEAST_SHARE = 0.98  # of the speed on synthetic views


@dataclass(kw_only=True)
class Config:
    """Steps per second with the loader and on synthetic views. All other options are those of fastssl-train."""

    repeats: int = 5
    """Blocks of each kind."""
    steps: int = 20
    """Steps per block."""
    peers: tuple[str, ...] = ()
    """Others to measure beside: lightly, lightly-amp, simsiam (for --method fastsiam or simsiam)."""
    peer_workers: int | None = None
    """Processes that load for each of them. None: one per core."""
    json: Path | None = None
    """Write every single measurement to this file."""

    def check(self) -> None:
        """Raise UserError for values that make no sense."""
        for name in ("repeats", "steps", "peer_workers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} is {value}: give 1 or more")
        for name in self.peers:
            if name not in PEERS:
                raise unknown("peer", name, PEERS)


class Own:
    """The trainer on a loader's batches. `warm` steps go before each block."""

    def __init__(self, trainer: Trainer, loader: Loader, clock: bottleneck.StepClock):
        self.trainer, self.clock, self.num_views = trainer, clock, trainer.spec.K
        self.batches, self.warm = loader.endless(), loader.num_slots + 1

    def begin(self) -> None:
        pass

    def step(self) -> None:
        batch = next(self.batches)
        with self.clock:
            self.trainer._advance(batch)

    def end(self) -> None:
        pass

    def close(self) -> None:
        self.batches.close()


class Other:
    """A peer with its loader, which has every block's batches to make, and some more, so that it is never idle."""

    def __init__(self, peer: Peer, trainer: Trainer, steps: int, workers: int):
        data, device = trainer.config.data, trainer.device
        self.num_views = peer.num_views(trainer.spec.K)
        self.train = peer.step(trainer.config.model.backbone, data.size, device)
        ahead = 2 * workers  # batches, torch's default
        self.warm = ahead + 1
        options = {"batch_size": trainer.loader.batch_size, "num": self.warm + steps + ahead, "workers": workers}
        self.round = peer.batches(Path(data.data), self.num_views, data.size, device=str(device), **options)

    def begin(self) -> None:
        self.views = iter(self.round(0))

    def step(self) -> None:
        self.train(next(self.views))

    def end(self) -> None:
        for _views in self.views:
            pass

    def close(self) -> None:
        pass


def others(config: Config, trainer: Trainer) -> tuple[dict[str, Other], dict[str, str]]:
    """The peers that can run here, and why the rest cannot. Raises UserError for training that they do not do."""
    if not config.peers:
        return {}, {}
    if trainer.config.model.method not in ("fastsiam", "simsiam"):
        raise UserError(f"--peers train FastSiam and SimSiam, not {trainer.config.model.method}: leave it out")
    if not Path(trainer.config.data.data).is_file():
        raise UserError(f"--peers read one .beton file, not {trainer.config.data.data}: give one")
    skipped = {name: why for name in config.peers if (why := PEERS[name].missing())}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = config.peer_workers or cores
    names = [name for name in config.peers if name not in skipped]
    return {name: Other(PEERS[name], trainer, config.steps, workers) for name in names}, skipped


def measure(config: Config, trainer: Trainer) -> Report:
    """Interleaved blocks of steps, seconds each, and what the loader did in its own."""
    loader = trainer.loader
    synthetic = Loader(
        trainer.reader,
        trainer.spec,
        batch_size=loader.batch_size,
        device=trainer.device,
        backend="synthetic",
        prefetch=loader.num_slots - 1,
        dtype=loader.dtype,
    )
    clock = bottleneck.StepClock(trainer.device)
    who, skipped = others(config, trainer)  # first, as their workers are copies of this process: before it has threads
    seconds: dict[str, list[float]] = {name: [] for name in (*who, "loader", "synthetic")}
    taken = dict.fromkeys(loader.stats.snapshot(), 0.0)
    network = 0.0
    with synthetic:
        who |= {"loader": Own(trainer, loader, clock), "synthetic": Own(trainer, synthetic, clock)}
        for number in range(config.repeats + 1):
            for name, contestant in who.items():
                contestant.begin()
                for _ in range(contestant.warm):
                    contestant.step()
                synchronize()
                before, network_before, start = loader.stats.snapshot(), clock.take(), time.perf_counter()
                for _ in range(config.steps):
                    contestant.step()
                synchronize()
                elapsed = time.perf_counter() - start
                if number:  # the first round compiles, warms up
                    seconds[name].append(elapsed)
                if number and name == "loader":
                    after = loader.stats.snapshot()
                    taken = {key: taken[key] + after[key] - before[key] for key in taken}
                    network += clock.take() - network_before
                contestant.end()
        for contestant in who.values():
            contestant.close()
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
    for column in ("training on", "views", "images/s", "spread", "views/s", "of synthetic", "ours is x", "spread"):
        table.add_column(column, justify="left" if column == "training on" else "right")
    rows = []
    views = {name: [who[name].num_views * rate for rate in values] for name, values in rates.items()}
    for name in ("loader", "synthetic", *(name for name in who if name in PEERS)):
        value, speed = figure(rates[name]), figure(views[name])
        of = share if name == "loader" else None
        faster = ratio(views["loader"], views[name]) if name in PEERS else None
        of_synthetic = {"loader": f"{share['median']:.3f}", "synthetic": "1"}.get(name, "-")
        compared = shown(faster), spread(faster) if faster else "-"
        table.add_row(
            name, str(who[name].num_views), shown(value), spread(value), shown(speed), of_synthetic, *compared
        )
        rows.append({"views_from": name, "num_views": who[name].num_views, "images_per_s": value})
        rows[-1] |= {"views_per_s": speed, "of_synthetic": of, "ours_over": faster}
    hours = trainer.total_steps * loader.batch_size / report.images_per_s
    rows.append({"ms_per_image": report.stages, "capacity": report.capacity, "limit": report.limit})
    about = {"training": dataclasses.asdict(trainer.config), "hours_in_all": hours / 3600}
    aim = verdict("speed with the loader, of that on synthetic views", share["median"], LEAST_SHARE)
    return Report(rows, [table, *report.lines(hours), aim], skipped, about)


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
        config.check()
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
        for who, why in report.skipped.items():
            console.print(f"without {who}: {why}", highlight=False, markup=False)
        if config.json is not None:
            write_json(config.json, "e2e", config, report)
        return 0

    return run_command("benchmarks.e2e", command, argv)


if __name__ == "__main__":
    sys.exit(main())
