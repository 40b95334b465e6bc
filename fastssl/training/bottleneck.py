"""The bottleneck report: how long each stage of the pipeline takes per image, and which resource limits the speed.

    read, decode, crop, augment    on the loader's threads, at the same time as everything else
    copy, GPU augment              launched by the producer's thread; done by the GPU beside the network
    network                        forward, backward, step
    wait                           the training loop without a batch: loading that the other stages do not hide

Stages that run at the same time do not add up. The slowest resource sets the pace; the second slowest says how much
faster training can become before another resource limits it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastssl.training.log import duration, figures
from fastssl.training.stopwatch import StepClock
from loaders import Loader

HOST_STAGES = ("read", "decode", "crop", "augment")


@dataclass(frozen=True)
class BottleneckReport:
    """Milliseconds per image of each stage, and what follows from them, for one process."""

    stages: dict[str, float]
    """Milliseconds per image, by the names of the module's docstring."""
    capacity: dict[str, float]
    """Images/s that each resource could do alone."""
    images_per_s: float

    @property
    def limit(self) -> str:
        """The resource that sets the pace."""
        return self._slowest()[0]

    @property
    def next_limit(self) -> str | None:
        """The resource that would set the pace if the first were infinitely fast."""
        return next(iter(self._slowest()[1:]), None)

    def _slowest(self) -> list[str]:
        return sorted(self.capacity, key=lambda name: self.capacity[name])

    def lines(self, seconds_to_go: float | None = None) -> list[str]:
        """Two lines for people: the stages, and what follows from them."""
        stages = "  ".join(f"{name} {_ms(ms)}" for name, ms in self.stages.items() if ms or name in ("network", "wait"))
        meaning = f"limit: {self.limit} ({figures(self.capacity[self.limit])} images/s alone)"
        if self.next_limit is not None:
            meaning += f"; next: {self.next_limit} ({figures(self.capacity[self.next_limit])} images/s)"
        if seconds_to_go is not None:
            meaning += f"; {duration(seconds_to_go)} to go"
        return [f"ms per image: {stages}", meaning]


class StageTimes:
    """Seconds of the loader's stages and of the network between `start` and `stop`, added up. Starts when made."""

    def __init__(self, loader: Loader, clock: StepClock):
        self.loader, self.clock, self.network = loader, clock, 0.0
        self.stats = dict.fromkeys(loader.stats.snapshot(), 0.0)
        self.start()

    def start(self) -> None:
        """Begin to count."""
        self._stats, self._network = self.loader.stats.snapshot(), self.clock.take()

    def stop(self) -> None:
        """Count no further."""
        for name, value in self.loader.stats.snapshot().items():
            self.stats[name] += value - self._stats[name]
        self.network += self.clock.take() - self._network

    def report(self, images: int, seconds: float) -> BottleneckReport:
        """The report of this time, in which `seconds` of training went over `images` images."""
        return report(
            self.stats,
            images=images,
            seconds=seconds,
            network_seconds=self.network,
            workers=self.loader.workers,
            on_gpu=self.loader.device.type == "cuda",
        )


def report(
    stats: Mapping[str, float], *, images: int, seconds: float, network_seconds: float, workers: int, on_gpu: bool
) -> BottleneckReport:
    """The report of `seconds` of training on `images` images.

    stats: the increase of the loader's `Stats` over that time; the loader may be some batches ahead of training.
    workers: threads of the loader. Raises ZeroDivisionError without an image.
    """
    ahead = stats["images"] or images
    stages = {name: 1000 * stats[name] / ahead for name in (*HOST_STAGES, "copy")}
    if on_gpu:
        stages["GPU augment"] = 1000 * stats["device"] / ahead
    stages["network"] = 1000 * network_seconds / images
    stages["wait"] = 1000 * stats["wait"] / images
    host = sum(stages[name] for name in HOST_STAGES) / workers
    used = {
        "the network": stages["network"],
        f"the loader's {workers} thread{'s' if workers > 1 else ''}": host,
        "the producer's thread": stages["copy"],
    }
    if on_gpu:
        used["augmentation on the GPU"] = stages["GPU augment"]
    capacity = {name: 1000 / ms for name, ms in used.items() if ms > 0}
    return BottleneckReport(stages, capacity, images / seconds)


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"
