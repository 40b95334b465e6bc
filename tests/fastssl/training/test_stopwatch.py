"""The clocks of a run."""

from __future__ import annotations

import time

import pytest
import torch

from fastssl.training import stopwatch
from fastssl.training.stopwatch import Interval, StepClock, Stopwatch


def test_pauses_count_neither_as_training_nor_in_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    now, steps, waited = 100.0, 0, 5.0
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now)
    watch = Stopwatch(lambda: (steps, waited))
    watch.start()
    now, steps, waited = 104.0, 2, 6.0
    assert watch.lap() == Interval(4, 2, 1)
    now, steps = 107.0, 3
    with watch.paused():
        now, waited = 1000.0, 0.0  # another loader, which begins to count anew
    now, steps, waited = 1002.0, 5, 0.5
    assert watch.lap() == Interval(2, 2, 0.5)
    assert watch.seconds == 4 + 3 + 2


def test_the_clock_counts_the_blocks() -> None:
    clock = StepClock(torch.device("cpu"))
    with clock:
        time.sleep(0.02)
    time.sleep(0.05)
    with clock:
        time.sleep(0.02)
    assert 0.04 <= clock.take() == clock.take()
    assert clock.take() < time.perf_counter()
