"""What a run is made of: how often it has each of its parts, and the seconds that they add up to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from fastssl.config import schema as configs
from fastssl.config.schema import RunConfig
from fastssl.training.build import make_views


@dataclass(frozen=True)
class Range:
    """A figure, and the lowest and the highest that it was in blocks of the measurement."""

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
class Costs:
    """Seconds, measured."""

    loop: Mapping[int, Range]
    """One step of the training loop, by size of the views."""
    start: Mapping[int, float]
    """Until the first step at each size: opening the data, building, compiling."""
    files: float = 0.0
    """Writing what the run folder holds besides checkpoints: the views at the start, weights and curves at the end."""
    checkpoint: float = 0.0
    """Writing one."""
    knn: float = 0.0
    """One evaluation of the monitor."""


def at_size(config: RunConfig, size: int) -> RunConfig:
    """The run with views of this size throughout."""
    return configs.replace(config, size=size, size_schedule=())


def waiting_bytes(config: RunConfig) -> int:
    """Of the batches of views that the loader keeps ready on a GPU, at most, in half precision."""
    if config.run.micro_batch is not None:  # made when they are asked for
        return 0
    pixels = max(sum(side**2 for side in make_views(config, size).sizes) for size in configs.sizes(config))
    return 2 * 3 * pixels * config.data.batch_size * config.data.prefetch


def steps_by_size(config: RunConfig, steps_per_epoch: int) -> Counter[int]:
    """How many steps the run makes with views of each size."""
    epochs, steps = config.optim.epochs, Counter()
    left = min(epochs * steps_per_epoch, config.run.max_steps or epochs * steps_per_epoch)
    for epoch in range(epochs):
        steps[configs.size_at(config, epoch)] += min(left, steps_per_epoch)
        left -= min(left, steps_per_epoch)
    return +steps  # without zeros


def parts(config: RunConfig, costs: Costs, steps_per_epoch: int) -> dict[str, tuple[int, Range]]:
    """What the run consists of: how often, and seconds in all."""
    by_size = steps_by_size(config, steps_per_epoch)
    steps = sum(by_size.values())
    training = sum((costs.loop[size] * num for size, num in by_size.items()), exactly(0))
    epochs = -(-steps // steps_per_epoch)  # begun
    # One at the end of each epoch, others by the clock in between.
    saves, minutes = epochs, config.run.checkpoint_minutes
    if minutes:
        saves += epochs * int(training.value / epochs / (60 * minutes))
    every = config.run.knn_every
    monitored = 1 + sum(e == epochs or bool(every and e % every == 0) for e in range(1, epochs + 1))
    monitored = monitored if config.data.val else 0
    return {
        "training": (steps, training),
        "kNN": (monitored, exactly(monitored * costs.knn)),
        "checkpoints": (saves, exactly(saves * costs.checkpoint)),
        "start": (len(by_size), exactly(sum(costs.start[size] for size in by_size))),
        "files": (1, exactly(costs.files)),
    }


def total(config: RunConfig, costs: Costs, steps_per_epoch: int) -> Range:
    """Seconds of the whole run."""
    return sum((seconds for _, seconds in parts(config, costs, steps_per_epoch).values()), exactly(0))
