"""Training with the loader against training on synthetic views, and against others' training with their loaders.

    python -m benchmarks.e2e [PRESET] --data TRAIN.beton [--repeats 5] [--steps 20] [--json FILE] [OPTIONS]
    python -m benchmarks.e2e --method fastsiam --data TRAIN.beton --peers lightly lightly-amp simsiam

One training step runs in blocks, alternately on the loader's batches and on tensors that were made beforehand (the
`synthetic` backend, infinitely fast). Some steps before each block are not counted: they use up batches that were
prepared while another block ran. A ratio of 1.0 is a loader that costs nothing. The bottleneck report of the loader's
blocks follows. OPTIONS, and PRESET, are those of fastssl-train. Nothing is written but --json.

--peers adds blocks of other people's training (benchmarks/peers.py) of the same backbone on the same JPEGs at the same
size and batch size, each with the DataLoader and the transforms of its users (benchmarks/contestants.py), with
--peer-workers processes, and a step that does what theirs does. Images come from the page cache in file order. SimSiam
makes and trains on two views of an image, so speeds are compared in views/s. After a peer's block its workers finish
the batches that they have begun before the next block starts.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.common import FILE_WIDTH, Report, figure, ratio, shown, spread, synchronize, write_json
from benchmarks.peers import PEERS, Peer
from benchmarks.step import verdict
from fastssl.cli import run_command
from fastssl.config.command_line import parse
from fastssl.training.bottleneck import StageTimes
from fastssl.training.build import Setup, join
from fastssl.training.stopwatch import StepClock
from loaders import Loader
from loaders.errors import UserError, unknown
from loaders.machine import default_workers

LEAST_SHARE = 0.98  # of the speed on synthetic views


@dataclass(kw_only=True)
class EndToEndOptions:
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


class Training:
    """Training in blocks of steps; `warm` uncounted steps go before each block."""

    num_views: int
    warm: int

    def begin(self) -> None:
        """Prepare a block."""

    def step(self) -> None:
        """Take a step."""
        raise NotImplementedError

    def end(self) -> None:
        """Leave nothing running behind a block."""


class OwnTraining(Training):
    """This project's training step on a loader's batches."""

    def __init__(self, setup: Setup, loader: Loader, clock: StepClock):
        self.setup, self.clock, self.num_views = setup, clock, setup.spec.K
        self.batches, self.warm, self.steps = loader.endless(), loader.num_slots + 1, 0

    def step(self) -> None:
        batch = next(self.batches)
        with self.clock:
            self.setup.step(batch, self.setup.progress(self.steps))
        self.steps += 1


class PeerTraining(Training):
    """A peer with its loader, which makes the batches of each block and some more, so that it is never idle."""

    def __init__(self, peer: Peer, setup: Setup, steps: int, workers: int):
        data, device = setup.config.data, setup.device
        self.num_views = peer.num_views(setup.spec.K)
        self.train = peer.step(setup.config.model.backbone, data.size, device)
        ahead = 2 * workers  # batches, torch's default
        self.warm = ahead + 1
        options = {"batch_size": setup.loader.batch_size, "num": self.warm + steps + ahead, "workers": workers}
        self.round = peer.batches(Path(data.data), self.num_views, data.size, device=str(device), **options)

    def begin(self) -> None:
        self.views = iter(self.round(0))

    def step(self) -> None:
        self.train(next(self.views))

    def end(self) -> None:
        for _views in self.views:
            pass


def peer_trainings(config: EndToEndOptions, setup: Setup) -> tuple[dict[str, Training], dict[str, str]]:
    """The peers that can run here, and why the rest cannot. Raises UserError for training that peers do not do."""
    if not config.peers:
        return {}, {}
    if setup.config.model.method not in ("fastsiam", "simsiam"):
        raise UserError(f"--peers train FastSiam and SimSiam, not {setup.config.model.method}: leave it out")
    if not Path(setup.config.data.data).is_file():
        raise UserError(f"--peers read one .beton file, not {setup.config.data.data}: give one")
    skipped = {name: why for name in config.peers if (why := PEERS[name].missing())}
    workers = config.peer_workers or default_workers(torch.device("cpu"))
    names = [name for name in config.peers if name not in skipped]
    return {name: PeerTraining(PEERS[name], setup, config.steps, workers) for name in names}, skipped


def measure(config: EndToEndOptions, setup: Setup) -> Report:
    """Interleaved blocks of steps, seconds each, and where the time of the loader's blocks went."""
    loader = setup.loader
    synthetic = Loader(
        setup.reader,
        setup.spec,
        batch_size=loader.batch_size,
        device=setup.device,
        backend="synthetic",
        prefetch=loader.num_slots - 1,
        dtype=loader.dtype,
    )
    clock = StepClock(setup.device)
    # Peers come first: their workers are copies of this process, made before it has threads.
    who, skipped = peer_trainings(config, setup)
    seconds: dict[str, list[float]] = {name: [] for name in (*who, "loader", "synthetic")}
    times = StageTimes(loader, clock)
    with synthetic:
        who |= {"loader": OwnTraining(setup, loader, clock), "synthetic": OwnTraining(setup, synthetic, clock)}
        for number in range(config.repeats + 1):  # the first round compiles, warms up
            for name, training in who.items():
                training.begin()
                for _ in range(training.warm):
                    training.step()
                synchronize()
                times.start()
                start = time.perf_counter()
                for _ in range(config.steps):
                    training.step()
                synchronize()
                if number:
                    seconds[name].append(time.perf_counter() - start)
                    if name == "loader":
                        times.stop()
                training.end()
    images = config.steps * loader.batch_size
    report = times.report(images * config.repeats, sum(seconds["loader"]))
    rates = {name: [images / s for s in values] for name, values in seconds.items()}
    views = {name: [who[name].num_views * rate for rate in values] for name, values in rates.items()}
    share = ratio(rates["loader"], rates["synthetic"])
    rows: list[dict[str, Any]] = []
    for name in ("loader", "synthetic", *(name for name in who if name in PEERS)):
        faster = ratio(views["loader"], views[name]) if name in PEERS else None
        rows.append({"views_from": name, "num_views": who[name].num_views, "images_per_s": figure(rates[name])})
        rows[-1] |= {"views_per_s": figure(views[name]), "of_synthetic": share if name == "loader" else None}
        rows[-1]["ours_over"] = faster
    hours = setup.total_steps * loader.batch_size / report.images_per_s
    title = f"training, {setup.config.data.data}, backend {loader.backend.name}"
    aim = verdict("speed with the loader, of that on synthetic views", share["median"], LEAST_SHARE)
    tables = [table(title, rows), *report.lines(hours), aim]
    rows.append({"ms_per_image": report.stages, "capacity": report.capacity, "limit": report.limit})
    about = {"training": dataclasses.asdict(setup.config), "hours_in_all": hours / 3600}
    return Report(rows, tables, skipped, about)


def table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for people."""
    made = Table(title=title, title_justify="left")
    for column in ("training on", "views", "images/s", "spread", "views/s", "of synthetic", "ours is x", "spread"):
        made.add_column(column, justify="left" if column == "training on" else "right")
    for row in rows:
        name, value, over = row["views_from"], row["images_per_s"], row["ours_over"]
        of = "1" if name == "synthetic" else shown(row["of_synthetic"])
        cells = (str(row["num_views"]), shown(value), spread(value), shown(row["views_per_s"]), of)
        made.add_row(name, *cells, shown(over), spread(over) if over else "-")
    return made


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status."""

    def command(arguments: list[str]) -> int:
        config, rest = tyro.cli(
            EndToEndOptions,
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
        training = parse(rest)
        with Setup(training, *join(training)) as setup:
            report = measure(config, setup)
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
