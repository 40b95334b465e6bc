"""The tables of --plan and --fit. Every figure says whether it is measured or derived."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from rich import box
from rich.table import Table

from fastssl.config import schema as configs
from fastssl.planning.cards import CARDS, EFFICIENCY, LAUNCH, seconds_per_image
from fastssl.planning.fit import options
from fastssl.planning.forecast import Forecast
from fastssl.planning.schedule import Range, exactly, steps_by_size, waiting_bytes
from fastssl.training.log import duration, figures
from loaders.machine import bytes_free, default_workers

_USABLE = 0.9  # share of a card's memory: the rest is the driver's, and what torch's allocator cannot use


def _table(title: str, *columns: str, left: int = 1) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for number, column in enumerate(columns):
        outer = number < left or number == len(columns) - 1
        table.add_column(column, justify="left" if outer else "right", overflow="fold")
    return table


def stages(forecast: Forecast) -> Iterator[Table | str]:
    """The speed of each part, and which part limits the run."""
    config, setup, loader = forecast.config, forecast.setup, forecast.setup.loader
    views, batch, loop = setup.spec.K, loader.batch_size, forecast.timings.loop[config.data.size]
    device = torch.cuda.get_device_name(setup.device) if setup.on_gpu else "CPU"
    yield (
        f"{config.model.method}, {config.model.backbone}, {views} views of {config.data.size} px, batch "
        f"{config.data.batch_size}, {config.optim.epochs} epochs of {forecast.steps_per_epoch} steps; on this machine: "
        f"{device}, {setup.precision}, {_cores()} cores"
    )
    table = _table("stages", "stage", "ms per image", "images/s", "views/s", "spread", "basis")

    def add(name: str, seconds: Range, basis: str) -> None:
        rate = batch / seconds.value
        low, high = (figures(batch / s) for s in (seconds.high, seconds.low))
        ms = figures(1000 / rate)
        table.add_row(name, ms, figures(rate), figures(views * rate), f"{low}-{high} images/s", basis)

    threads = f"{loader.workers} thread{'s' if loader.workers > 1 else ''}"
    add("loader alone", forecast.loader, f"measured: backend {loader.backend.name}, {threads}")
    for name, ms in forecast.stages.items():
        if ms:
            rate = 1000 * loader.workers / ms
            table.add_row(f"  {name}", figures(ms), figures(rate), figures(views * rate), "", "measured: a thread's ms")
    add("step alone", forecast.step, "measured: one batch again and again")
    add("training loop", loop, "measured: both together")
    for size, seconds in sorted(forecast.timings.loop.items()):
        if size != config.data.size:
            add(f"  at {size} px", seconds, "measured: both together")
    yield table
    yield from forecast.report.lines()
    if setup.on_gpu:
        yield f"the loop reaches {100 * forecast.step.value / loop.value:.0f} % of the step alone (measured)"
    else:
        cost = 1 - forecast.step.value / loop.value
        share = f"{100 * cost:.0f} %" if loop.low > forecast.step.value else "nothing measurable"
        yield f"loader and network share the cores: the loader costs {share} of the time (measured)"


def hours(forecast: Forecast) -> Iterator[Table | str]:
    """The duration of the run, part by part."""
    table = _table("the whole run", "part", "how often", "each", "time", "spread", "basis")
    one_size = len(configs.sizes(forecast.config)) == 1
    each = {"training": "steps", "kNN": "evaluations", "start": "size" if one_size else "sizes"}
    for name, (num, seconds) in forecast.parts().items():
        if num:
            spread = f"{_time(seconds.low)}-{_time(seconds.high)}" if seconds.low < seconds.high else ""
            one = f"{figures(seconds.value / num)} s"
            basis = "derived: measured on some of its images" if name == "kNN" else "measured, times their number"
            table.add_row(name, f"{num:,} {each.get(name, '')}".strip(), one, _time(seconds.value), spread, basis)
    table.add_row("in all", "", "", spell(forecast.seconds()), "", "derived: the sum", style="bold")
    yield table
    if forecast.neighbours > 0.05 * _cores():
        yield (
            f"other programs kept {forecast.neighbours:.1f} of {os.cpu_count()} cores busy while the loop was "
            "measured: as long as they do, it takes this long; on a quiet machine less (measured)"
        )


def spell(seconds: Range) -> str:
    """A time with its spread, 10.4 h (10.1-10.9): in minutes below 0.1 h, in seconds below 1.5 min."""
    unit, name = next(x for x in ((360, 3600, "h"), (90, 60, "min"), (0, 1, "s")) if seconds.value >= x[0])[1:]
    value, low, high = (f"{s / unit:.3g}" for s in (seconds.value, seconds.low, seconds.high))
    return f"{value} {name}" + (f" ({low}-{high})" if low != high else "")


def _time(seconds: float) -> str:
    return f"{seconds:.1f}s" if seconds < 100 else duration(seconds)


def disk(forecast: Forecast, real: Path) -> Iterator[str]:
    """Memory, the run folder, the data."""
    setup, free = forecast.setup, bytes_free(torch.device("cpu"))
    where = "GPU" if setup.on_gpu else "host"
    yield f"\n{where} memory: {_gb(forecast.memory)} at most (measured; torch's tensors" + (
        ")" if setup.on_gpu else ", program and the data's pages in use)"
    )
    yield f"of it: {forecast.bench.memory} (measured in one step)"
    need = 2 * forecast.checkpoint_bytes + forecast.weights_bytes * (2 if forecast.config.run.recalibrate_bn else 1)
    yield (
        f"disk: {_gb(need)} in {real} (measured: checkpoint {_gb(forecast.checkpoint_bytes)}, twice while it is "
        f"replaced, weights {_gb(forecast.weights_bytes)}); {_gb(shutil.disk_usage(forecast.folder).free)} are free"
    )
    size = sum(path.stat().st_size for path in setup.reader.paths)
    fits = (
        "they fit into it: the disk is read in the first epoch only"
        if size < free
        else "they do not fit: every epoch reads the disk (see --order page)"
    )
    yield f"data: {len(setup.reader):,} images, {_gb(size)} (measured); {_gb(free)} of memory free: {fits}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"


def cards(forecast: Forecast) -> Iterator[Table | str]:
    """The same training on other cards."""
    setup, costs = forecast.setup, forecast.step_costs
    by_size = steps_by_size(forecast.config, forecast.steps_per_epoch)
    steps, batch, views = sum(by_size.values()), forecast.config.data.batch_size, setup.spec.K
    # The host's work beside a GPU, which augments itself: CPU seconds per image.
    host, threads = sum(forecast.stages[name] for name in ("read", "decode", "crop")) / 1000, max(1, _cores() - 1)
    columns = ("card", "views/s", "training", "fed by this host", "limit", "host threads", "memory", "basis")
    table = _table("training on one card", *columns)
    here = torch.cuda.get_device_name(setup.device) if setup.on_gpu else "this CPU"
    _, training = forecast.parts()["training"]
    rate = figures(views * steps * batch / training.value)
    row = [rate, spell(training), "", forecast.report.limit, str(setup.loader.workers), _gb(forecast.memory)]
    table.add_row(here, *row, "measured", style="bold")
    peak = max(cost.peak for cost in costs.values()) + waiting_bytes(forecast.config)
    for card in CARDS:
        alone = sum(num * batch * seconds_per_image(card, costs[size])[0] for size, num in by_size.items())
        fed = max(alone, steps * batch * host / threads)
        own = seconds_per_image(card, costs[max(by_size)])[1]
        limit = f"its {own}" if fed == alone else "this host's decoding"
        fits = "" if peak < _USABLE * card.memory else ", too much"
        row = [figures(views * steps * batch / alone), spell(exactly(alone)), spell(exactly(fed)), limit]
        table.add_row(card.name, *row, f"{steps * batch / alone * host:.1f}", _gb(peak) + fits, "derived")
    yield table
    flops = sum(costs[size].flops * num for size, num in by_size.items()) / steps
    moved = sum(costs[size].bytes * num for size, num in by_size.items()) / steps
    less = ", ".join(f"{c.name}: {c.reach:.2f} times as much" for c in CARDS if c.reach != 1)
    yield (
        f"derived: {figures(flops / 1e9)} GFLOP and {figures(moved / 1e9)} GB of memory traffic per image, counted in "
        "half precision, no operation fused with another; a card needs the longer of traffic / bandwidth and "
        f"FLOP / tensor rate (its data sheet), divided by {EFFICIENCY:.2f}, what published trainings of ResNet-50 "
        f"reach of that ({less}), and at least {1e6 * LAUNCH:.0f} us per operation (assumed). Compiled steps may be "
        "faster; images that do not fill the card, and transformers, reach less. Memory: in use at once, without "
        "driver and work space. Host threads: how many keep the card busy, and what limits with "
        f"the {threads} beside the training loop here, at {1000 * host:.3f} ms per image and thread, measured with the "
        f"backend {setup.loader.backend.name}."
    )


def _cores() -> int:
    """Usable cores."""
    return default_workers(torch.device("cpu"))


def fit(forecast: Forecast, budget: float) -> Iterator[Table | str]:
    """Flags with which the run meets a budget of seconds."""
    found = options(forecast, budget)
    table = _table(f"within {budget / 3600:g} h on this machine", "flags", "time", "fits", "basis")
    for option in found:
        fits = "yes" if option.seconds.value <= budget else "no"
        table.add_row(option.flags, spell(option.seconds), fits, option.basis)
    yield table
    if not any(o.seconds.value <= budget for o in found):
        best = min(found, key=lambda o: o.seconds.value)
        yield f"nothing fits; the best there is takes {spell(best.seconds)}: {best.flags}"
