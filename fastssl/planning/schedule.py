"""The schedule of a run: how often each of its parts occurs, and the seconds that they add up to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from fastssl.config import schema as configs
from fastssl.config.schema import RunConfig
from fastssl.training.build import make_views


@dataclass(frozen=True)
class Range:
    """A figure with its lowest and highest value in the blocks of the measurement."""

    value: float
    low: float
    high: float

    def __add__(self, other: Range) -> Range:
        return Range(self.value + other.value, self.low + other.low, self.high + other.high)

    def __mul__(self, factor: float) -> Range:
        return Range(self.value * factor, self.low * factor, self.high * factor)


def exactly(value: float) -> Range:
    """A figure without spread."""
    return Range(value, value, value)


@dataclass(frozen=True)
class Timings:
    """Measured seconds of a run's parts."""

    loop: Mapping[int, Range]
    """One step of the training loop, by size of the views."""
    start: Mapping[int, float]
    """Until the first step at each size: opening the data, building, compiling."""
    files: float = 0.0
    """Writing what the run folder holds besides checkpoints: the views at the start, weights and curves at the end."""
    checkpoint: float = 0.0
    """Writing one checkpoint."""
    knn: float = 0.0
    """One evaluation of the monitor."""


def at_size(config: RunConfig, size: int) -> RunConfig:
    """The run with views of this size throughout."""
    return configs.replace(config, size=size, size_schedule=())


def waiting_bytes(config: RunConfig) -> int:
    """Most bytes of views that the loader keeps ready on a GPU, in half precision."""
    if config.run.micro_batch is not None:  # then views are made when they are asked for
        return 0
    pixels = max(sum(side**2 for side in make_views(config, size).sizes) for size in configs.sizes(config))
    return 2 * 3 * pixels * config.data.batch_size * config.data.prefetch


def steps_by_size(config: RunConfig, steps_per_epoch: int) -> Counter[int]:
    """Steps of the run with views of each size."""
    epochs = config.optim.epochs
    steps: Counter[int] = Counter()
    left = min(epochs * steps_per_epoch, config.run.max_steps or epochs * steps_per_epoch)
    for epoch in range(epochs):
        steps[configs.size_at(config, epoch)] += min(left, steps_per_epoch)
        left -= min(left, steps_per_epoch)
    return +steps  # without zeros


def parts(config: RunConfig, timings: Timings, steps_per_epoch: int) -> dict[str, tuple[int, Range]]:
    """The parts of the run, each with its number and its seconds in all."""
    by_size = steps_by_size(config, steps_per_epoch)
    steps = sum(by_size.values())
    training = sum((timings.loop[size] * num for size, num in by_size.items()), exactly(0))
    epochs = -(-steps // steps_per_epoch)  # epochs that are begun
    # A checkpoint at the end of each epoch, others by the clock in between.
    saves, minutes = epochs, config.run.checkpoint_minutes
    if minutes:
        saves += epochs * int(training.value / epochs / (60 * minutes))
    every = config.run.knn_every
    monitored = 1 + sum(e == epochs or bool(every and e % every == 0) for e in range(1, epochs + 1))
    monitored = monitored if config.data.val else 0
    return {
        "training": (steps, training),
        "kNN": (monitored, exactly(monitored * timings.knn)),
        "checkpoints": (saves, exactly(saves * timings.checkpoint)),
        "start": (len(by_size), exactly(sum(timings.start[size] for size in by_size))),
        "files": (1, exactly(timings.files)),
    }


def total(config: RunConfig, timings: Timings, steps_per_epoch: int) -> Range:
    """Seconds of the whole run."""
    return sum((seconds for _, seconds in parts(config, timings, steps_per_epoch).values()), exactly(0))
