"""Time on two clocks: `Stopwatch` for the run, `StepClock` for the network alone."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Interval:
    """Training between two moments, pauses left out."""

    seconds: float
    steps: int
    waited: float
    """Seconds that the training loop waited for the loader."""


class Stopwatch:
    """Seconds of training, and how far each interval of them got; pauses count in neither.

    position: gives the steps done and the seconds waited for the loader so far.
    """

    def __init__(self, position: Callable[[], tuple[int, float]]):
        self.seconds = 0.0
        self._position = position

    def start(self) -> None:
        """Begin an interval."""
        self._began = time.perf_counter()
        self._steps, self._waited = self._position()

    def lap(self) -> Interval:
        """End the interval, count its seconds and begin the next one."""
        began, steps_before, waited_before = self._began, self._steps, self._waited
        self.start()
        seconds = self._began - began
        self.seconds += seconds
        return Interval(seconds, self._steps - steps_before, self._waited - waited_before)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A pause: what happens in the block is not training."""
        self.lap()
        yield
        self.start()


class StepClock:
    """Seconds that the network itself took: a `with` block around each step, `take` now and then.

    On a GPU the block is timed by events in the stream, from the moment that its batch is there. Only `take` waits for
    events, and is meant for moments when the device is at rest anyway.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        if self._cuda:
            self._begin = _event()
        else:
            self._began = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        if self._cuda:
            self._events.append((self._begin, _event()))
        else:
            self._seconds += time.perf_counter() - self._began

    def take(self) -> float:
        """Seconds of all blocks so far."""
        for begin, end in self._events:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000
        self._events.clear()
        return self._seconds


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
