"""Where the time goes and what limits the speed: the stages of the pipeline side by side, per image.

    read, decode, crop, augment    on the loader's threads, side by side with everything else
    copy, GPU augment              launched by the feeder thread; done by the GPU beside the network
    network                        forward, backward, step
    wait                           the training loop without a batch: the part of the loader that was not hidden

Stages that run side by side do not add up: the slowest resource sets the pace, the second slowest says how much there
is to win before something else limits.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fastssl.training.log import duration, figures

HOST_STAGES = ("read", "decode", "crop", "augment")


class StepClock:
    """Seconds that the network itself took: a `with` block around each step, `take` now and then.

    On a GPU the block is timed by events in the stream, which start when its batch is there; nothing waits for them
    until `take`, which must be called when the device is at rest anyway.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.seconds = 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> None:
        self.begun = self._now()

    def __exit__(self, *exc: object) -> None:
        if self.cuda:
            self.events.append((self.begun, self._now()))
        else:
            self.seconds += self._now() - self.begun

    def take(self) -> float:
        """Seconds since it was made, over all blocks."""
        for begin, end in self.events:
            end.synchronize()
            self.seconds += begin.elapsed_time(end) / 1000
        self.events.clear()
        return self.seconds


@dataclass(frozen=True)
class Report:
    """Milliseconds per image of each stage, and what follows from them. All figures are of one process."""

    stages: dict[str, float]  # ms per image, as in the module's docstring
    capacity: dict[str, float]  # images/s that each resource could do if it were alone
    images_per_s: float  # what was done

    @property
    def limit(self) -> str:
        """The resource that sets the pace."""
        return min(self.capacity, key=self.capacity.get)

    @property
    def next_limit(self) -> str | None:
        """The one that would, if the first were infinitely fast."""
        rest = {k: v for k, v in self.capacity.items() if k != self.limit}
        return min(rest, key=rest.get) if rest else None

    def lines(self, seconds_to_go: float | None = None) -> list[str]:
        """For people: the stages, and what they mean."""
        stages = "  ".join(f"{name} {_ms(ms)}" for name, ms in self.stages.items() if ms or name in ("network", "wait"))
        meaning = f"limit: {self.limit} ({figures(self.capacity[self.limit])} images/s alone)"
        if self.next_limit is not None:
            meaning += f"; next: {self.next_limit} ({figures(self.capacity[self.next_limit])} images/s)"
        if seconds_to_go is not None:
            meaning += f"; {duration(seconds_to_go)} to go"
        return [f"ms per image: {stages}", meaning]


def report(
    stats: Mapping[str, float], *, images: int, seconds: float, network_seconds: float, workers: int, on_gpu: bool
) -> Report:
    """What `seconds` of training on `images` images say.

    stats: the increase of the loader's `Stats` over that time; its own `images` may be some batches ahead.
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
        "the feeder thread": stages["copy"],
    }
    if on_gpu:
        used["augmentation on the GPU"] = stages["GPU augment"]
    capacity = {name: 1000 / ms for name, ms in used.items() if ms > 0}
    return Report(stages, capacity, images / seconds)


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"
