"""fastssl-train --plan: what a run will cost, measured on this machine before it starts. --fit: what meets a budget.

How it is measured and counted is told in planning/bench.py. Figures for other cards are derived (planning/cards.py).
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from fastssl.config import schema as configs
from fastssl.config.command_line import default_folder
from fastssl.config.schema import RunConfig
from fastssl.planning.bench import Bench, Neighbours
from fastssl.planning.cards import CARDS, EFFICIENCY, LAUNCH, seconds_per_image
from fastssl.planning.cost import work
from fastssl.planning.schedule import Costs, Range, at_size, exactly, parts, steps_by_size, total, waiting_bytes
from fastssl.training.build import make_method
from fastssl.training.log import duration, figures
from loaders.errors import UserError
from loaders.machine import bytes_free, default_workers

_WIDTH = 140  # of tables that go to a file or a pipe, characters
_USABLE = 0.9  # of a card's memory: the rest is the driver's, and what torch's allocator cannot use


class Plan:
    """Everything that is measured of a run, for some seconds; `folder` is empty and not the run's."""

    def __init__(self, config: RunConfig, folder: Path):
        self.config, self.folder = config, folder
        with Bench(config, folder / "run") as bench:
            self.bench = bench
            self.step = bench.step_alone()
            self.loader, self.stages = bench.loader_alone()
            neighbours = Neighbours()
            loop, self.report = bench.loop(ahead=self._ahead)
            self.others = neighbours.cores()
            self.memory = bench.peak()
            saving, files, self.checkpoint_bytes, self.weights_bytes = bench.write()
            size = config.data.size
            self.costs = Costs({size: loop}, {size: bench.start}, files, saving, bench.knn())
        self.measure_sizes(configs.sizes(config))
        self.work = {size: work(at_size(config, size)) for size in configs.sizes(config)}

    @property
    def _ahead(self) -> bool:
        return 2 * self.loader.value > self.step.value

    def loop(self, **changes: int) -> tuple[Range, float]:
        """Seconds per step of the loop with options changed, and until its first step. Raises UserError if the options
        do not go together."""
        with Bench(configs.replace(self.config, **changes), self.folder / "changed") as bench:
            return bench.loop(ahead=self._ahead)[0], bench.start

    def measure_sizes(self, others: tuple[int, ...]) -> None:
        """Measure the loop at these sizes, too."""
        for size in {*others} - {*self.costs.loop}:
            loop, start = self.loop(size=size)
            loops, starts = self.costs.loop | {size: loop}, self.costs.start | {size: start}
            self.costs = dataclasses.replace(self.costs, loop=loops, start=starts)

    def parts(self) -> dict[str, tuple[int, Range]]:
        """What the run consists of: how often, and seconds in all."""
        return parts(self.config, self.costs, self.steps_per_epoch)

    def seconds(self, config: RunConfig | None = None, factor: float = 1.0) -> Range:
        """Of the whole run, or of a changed one whose steps take `factor` times as long."""
        loop = {size: seconds * factor for size, seconds in self.costs.loop.items()}
        costs = dataclasses.replace(self.costs, loop=loop)
        return total(config or self.config, costs, self.steps_per_epoch)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps."""
        return len(self.bench.loader)


# ------------------------------------------------------------------ --fit


@dataclass(frozen=True)
class Option:
    """A way to spend less (or more) time."""

    flags: str
    seconds: Range
    basis: str
    factor: float = 1.0
    """Of a step's time."""


def options(plan: Plan, budget: float) -> list[Option]:
    """The run as it is, and what could be changed for it to take at most `budget` seconds: of epochs, views and sizes
    each the most expensive way that fits, else the cheapest there is; if neither views nor sizes alone do, both.

    Measures the loop a few times more.
    """
    views, schedules = _fewer_views(plan), _schedules(plan)
    found = [Option("(as it is)", plan.seconds(), "measured"), _epochs(plan, budget)]
    for choices in (views, schedules):  # from expensive to cheap
        found += [o for o in choices if o.seconds.value <= budget][:1] or choices[-1:]
    if views and schedules and min(o.seconds.value for o in (*views, *schedules)) > budget:
        changed = configs.replace(plan.config, size_schedule=candidates(plan.config.data.size)[-1])
        factor, flags = views[-1].factor, f"{views[-1].flags} {schedules[-1].flags}"
        basis = "derived: both gains multiplied"
        found.append(Option(flags, plan.seconds(changed, factor), basis))
        if found[-1].seconds.value > budget:
            found.append(_epochs(plan, budget, changed, factor, flags, basis))
    return found


def _epochs(
    plan: Plan,
    budget: float,
    config: RunConfig | None = None,
    factor: float = 1.0,
    flags: str = "",
    basis: str = "measured",
) -> Option:
    """The run, or a changed one, with as many epochs as fit."""
    config = config or plan.config

    def seconds(epochs: int) -> Range:
        return plan.seconds(configs.replace(config, epochs=epochs), factor)

    # Warm-up has to end, and each size has its epoch.
    fewest = max(int(config.optim.warmup_epochs) + 1, len(configs.sizes(config)))
    epochs = most_that_fit(lambda n: seconds(n).value, budget, fewest)
    return Option(f"{flags} --epochs {epochs}".strip(), seconds(epochs), basis)


def most_that_fit(seconds: Callable[[int], float], budget: float, fewest: int) -> int:
    """The largest n from `fewest` on with seconds(n) <= budget, which grows with n; `fewest` if there is none."""
    low, high = fewest, fewest + 1
    while seconds(high) <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if seconds(middle) <= budget else (low, middle)
    return low


def _fewer_views(plan: Plan) -> list[Option]:
    """The run with fewer views, down to 2, where the method has their number as an option."""
    now, found = getattr(plan.config.method_options, "num_views", 2), []
    if now <= 2:
        return found
    try:
        two = plan.loop(num_views=2)[0].value / plan.costs.loop[plan.config.data.size].value
    except UserError:  # this variant of the method needs more
        return found
    for num in range(now - 1, 1, -1):
        # An image is read and decoded once, whatever K is; the rest grows with K: a line.
        factor = two + (1 - two) * (num - 2) / (now - 2)
        basis = "measured" if num == 2 else f"derived: on a line from 2 to {now} views"
        found.append(Option(f"--num-views {num}", plan.seconds(factor=factor), basis, factor))
    return found


def candidates(size: int) -> list[tuple[int, ...]]:
    """Size schedules that end at `size`, from expensive to cheap: 160:224, 128:160:224 and 128:128:224 for 224 px."""
    step = 32 if size >= 128 else 8
    small, middle = (max(step, round(size * share / step) * step) for share in (4 / 7, 5 / 7))
    return [sizes for sizes in ((middle, size), (small, middle, size), (small, small, size)) if sizes[0] < size]


def _schedules(plan: Plan) -> list[Option]:
    """The run with progressive sizes."""
    found = []
    for schedule in candidates(plan.config.data.size):
        changed = configs.replace(plan.config, size_schedule=schedule)
        try:
            configs.validate(changed)
            with torch.device("meta"):
                make_method(changed)
            plan.measure_sizes(schedule)
        except UserError:  # not sizes that this network, or this cut into tiles, takes
            continue
        found.append(Option(f"--size-schedule {':'.join(map(str, schedule))}", plan.seconds(changed), "measured"))
    return found


# ------------------------------------------------------------------ printing


def run(config: RunConfig, console: Console | None = None) -> int:
    """The command. Returns the exit status. Raises UserError for a run that could not start."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--plan measures one process: start it without torchrun, with one process's --batch-size")
    if config.run.fit is not None and config.run.max_steps is not None:
        raise UserError("--fit counts whole runs: leave --max-steps out")
    configs.validate(config)
    console = console or Console()
    if not console.is_terminal:
        console.width = _WIDTH
    real = Path(config.run.out) if config.run.out else default_folder(config)
    with _scratch(real) as folder:
        start = time.perf_counter()
        try:
            plan = Plan(config, Path(folder))
            fit = _fit(plan, 3600 * config.run.fit) if config.run.fit is not None else ()
            for item in itertools.chain(_stages(plan), _hours(plan), _disk(plan, real), _cards(plan), fit):
                console.print(item, highlight=False, markup=False, soft_wrap=isinstance(item, str))
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"out of GPU memory beside the training step, with --batch-size {config.data.batch_size}; the run "
                "would be, too: try a smaller --prefetch or --batch-size"
            ) from error
        console.print(f"\nmeasured for {duration(time.perf_counter() - start)}; nothing was trained, nothing is kept")
    return 0


def _scratch(real: Path) -> tempfile.TemporaryDirectory:
    """A folder on the disk of the run's own, so that checkpoints take as long; elsewhere if nothing may be written."""
    parent = next(p for p in real.absolute().parents if p.is_dir())
    if not os.access(parent, os.W_OK):
        parent = None
    return tempfile.TemporaryDirectory(prefix=".fastssl-plan-", dir=parent)


def _table(title: str, *columns: str, left: int = 1) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for number, column in enumerate(columns):
        outer = number < left or number == len(columns) - 1
        table.add_column(column, justify="left" if outer else "right", overflow="fold")
    return table


def _stages(plan: Plan) -> Iterator[Table | str]:
    """How fast the parts are, and which one limits."""
    config, bench, loader = plan.config, plan.bench, plan.bench.loader
    views, loop = bench.trainer.spec.K, plan.costs.loop[config.data.size]
    device = torch.cuda.get_device_name(bench.trainer.device) if bench.cuda else "CPU"
    yield (
        f"{config.model.method}, {config.model.backbone}, {views} views of {config.data.size} px, batch "
        f"{config.data.batch_size}, {config.optim.epochs} epochs of {plan.steps_per_epoch} steps; on this machine: "
        f"{device}, {bench.trainer.precision}, {_cores()} cores"
    )
    table = _table("stages", "stage", "ms per image", "images/s", "views/s", "spread", "basis")

    def add(name: str, seconds: Range, basis: str) -> None:
        rate = bench.images / seconds.value
        low, high = (figures(bench.images / s) for s in (seconds.high, seconds.low))
        ms = figures(1000 / rate)
        table.add_row(name, ms, figures(rate), figures(views * rate), f"{low}-{high} images/s", basis)

    threads = f"{loader.workers} thread{'s' if loader.workers > 1 else ''}"
    add("loader alone", plan.loader, f"measured: backend {loader.backend.name}, {threads}")
    for name, ms in plan.stages.items():
        if ms:
            rate = 1000 * loader.workers / ms
            table.add_row(f"  {name}", figures(ms), figures(rate), figures(views * rate), "", "measured: a thread's ms")
    add("step alone", plan.step, "measured: one batch again and again")
    add("training loop", loop, "measured: both together")
    for size, seconds in sorted(plan.costs.loop.items()):
        if size != config.data.size:
            add(f"  at {size} px", seconds, "measured: both together")
    yield table
    yield from plan.report.lines()
    if bench.cuda:
        yield f"the loop reaches {100 * plan.step.value / loop.value:.0f} % of the step alone (measured)"
    else:
        cost = 1 - plan.step.value / loop.value
        share = f"{100 * cost:.0f} %" if loop.low > plan.step.value else "nothing measurable"
        yield f"loader and network share the cores: the loader costs {share} of the time (measured)"


def _hours(plan: Plan) -> Iterator[Table | str]:
    """How long the run takes."""
    table = _table("the whole run", "part", "how often", "each", "time", "spread", "basis")
    each = {"training": "steps", "kNN": "evaluations", "start": f"size{'s' * (len(configs.sizes(plan.config)) > 1)}"}
    for name, (num, seconds) in plan.parts().items():
        if num:
            spread = f"{_time(seconds.low)}-{_time(seconds.high)}" if seconds.low < seconds.high else ""
            one = f"{figures(seconds.value / num)} s"
            basis = "derived: measured on some of its images" if name == "kNN" else "measured, times their number"
            table.add_row(name, f"{num:,} {each.get(name, '')}".strip(), one, _time(seconds.value), spread, basis)
    table.add_row("in all", "", "", hours(plan.seconds()), "", "derived: the sum", style="bold")
    yield table
    if plan.others > 0.05 * _cores():
        yield (
            f"other programs kept {plan.others:.1f} of {os.cpu_count()} cores busy while the loop was measured: as "
            "long as they do, it takes this long; on a quiet machine less (measured)"
        )


def hours(seconds: Range) -> str:
    """10.4 h (10.1-10.9); minutes where that is below a tenth, and seconds where it is below one and a half."""
    unit, name = next(x for x in ((360, 3600, "h"), (90, 60, "min"), (0, 1, "s")) if seconds.value >= x[0])[1:]
    value, low, high = (f"{s / unit:.3g}" for s in (seconds.value, seconds.low, seconds.high))
    return f"{value} {name}" + (f" ({low}-{high})" if low != high else "")


def _time(seconds: float) -> str:
    return f"{seconds:.1f}s" if seconds < 100 else duration(seconds)


def _disk(plan: Plan, real: Path) -> Iterator[str]:
    """Memory, the run folder, the data."""
    reader, free = plan.bench.trainer.reader, bytes_free(torch.device("cpu"))
    where = "GPU" if plan.bench.cuda else "host"
    yield f"\n{where} memory: {_gb(plan.memory)} at most (measured; torch's tensors" + (
        ")" if plan.bench.cuda else ", program and the data's pages in use)"
    )
    yield f"of it: {plan.bench.memory} (measured in one step)"
    need = 2 * plan.checkpoint_bytes + plan.weights_bytes * (2 if plan.config.run.recalibrate_bn else 1)
    yield (
        f"disk: {_gb(need)} in {real} (measured: checkpoint {_gb(plan.checkpoint_bytes)}, twice while it is replaced, "
        f"weights {_gb(plan.weights_bytes)}); {_gb(shutil.disk_usage(plan.folder).free)} are free"
    )
    size = sum(path.stat().st_size for path in reader.paths)
    fits = (
        "they fit into it: the disk is read in the first epoch only"
        if size < free
        else "they do not fit: every epoch reads the disk (see --order page)"
    )
    yield f"data: {len(reader):,} images, {_gb(size)} (measured); {_gb(free)} of memory free: {fits}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"


def _cards(plan: Plan) -> Iterator[Table | str]:
    """The same training elsewhere."""
    by_size = steps_by_size(plan.config, plan.steps_per_epoch)
    steps, batch, views = sum(by_size.values()), plan.config.data.batch_size, plan.bench.trainer.spec.K
    # What is left to the host beside a GPU, which augments itself: CPU time per image.
    host, threads = sum(plan.stages[name] for name in ("read", "decode", "crop")) / 1000, max(1, _cores() - 1)
    columns = ("card", "views/s", "training", "fed by this host", "limit", "host threads", "memory", "basis")
    table = _table("training on one card", *columns)
    here = torch.cuda.get_device_name(plan.bench.trainer.device) if plan.bench.cuda else "this CPU"
    _, training = plan.parts()["training"]
    rate = figures(views * steps * batch / training.value)
    row = (rate, hours(training), "", plan.report.limit, str(plan.bench.loader.workers), _gb(plan.memory))
    table.add_row(here, *row, "measured", style="bold")
    peak = max(w.peak for w in plan.work.values()) + waiting_bytes(plan.config)
    for card in CARDS:
        alone = sum(num * batch * seconds_per_image(card, plan.work[size])[0] for size, num in by_size.items())
        fed = max(alone, steps * batch * host / threads)
        own = seconds_per_image(card, plan.work[max(by_size)])[1]
        limit = f"its {own}" if fed == alone else "this host's decoding"
        fits = "" if peak < _USABLE * card.memory else ", too much"
        row = (figures(views * steps * batch / alone), hours(exactly(alone)), hours(exactly(fed)), limit)
        table.add_row(card.name, *row, f"{steps * batch / alone * host:.1f}", _gb(peak) + fits, "derived")
    yield table
    flops, moved = (sum(getattr(plan.work[s], x) * n for s, n in by_size.items()) / steps for x in ("flops", "bytes"))
    less = ", ".join(f"{c.name}: {c.reach:.2f} times as much" for c in CARDS if c.reach != 1)
    yield (
        f"derived: {figures(flops / 1e9)} GFLOP and {figures(moved / 1e9)} GB of memory traffic per image, counted in "
        "half precision, no operation fused with another; a card needs the longer of traffic / bandwidth and "
        f"FLOP / tensor rate (its data sheet), divided by {EFFICIENCY:.2f}, what published trainings of ResNet-50 "
        f"reach of that ({less}), and at least {1e6 * LAUNCH:.0f} us per operation (assumed). Compiled steps may be "
        "faster; images that do not fill the card, and transformers, reach less. Memory: in use at once, without "
        "driver and work space. Host threads: how many keep the card busy, and what limits with "
        f"the {threads} beside the training loop here, at {1000 * host:.3f} ms per image and thread, measured with the "
        f"backend {plan.bench.loader.backend.name}."
    )


def _cores() -> int:
    """Usable cores."""
    return default_workers(torch.device("cpu"))


def _fit(plan: Plan, budget: float) -> Iterator[Table | str]:
    """What meets the budget."""
    found = options(plan, budget)
    table = _table(f"within {budget / 3600:g} h on this machine", "flags", "time", "fits", "basis")
    for option in found:
        fits = "yes" if option.seconds.value <= budget else "no"
        table.add_row(option.flags, hours(option.seconds), fits, option.basis)
    yield table
    if not any(o.seconds.value <= budget for o in found):
        best = min(found, key=lambda o: o.seconds.value)
        yield f"nothing fits; the best there is takes {hours(best.seconds)}: {best.flags}"
