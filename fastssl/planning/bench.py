"""Measuring a run: its parts, timed on this machine, each for some seconds.

    the loader alone        read, decode, crop (, augment)        explains
    the step alone          one batch over and over                explains
    both together           the training loop                      what hours are predicted from

On a GPU the loop is as slow as the slower of the two. On a CPU they share the cores, and the loop is slower than both.
So hours are predicted from the loop. It is made of the run's own parts (`training.build`), in another folder. What a
run does besides (start, checkpoints, kNN monitor) is timed once and counted.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from fastssl import export
from fastssl.config import schema as configs
from fastssl.config.schema import RunConfig
from fastssl.evaluate import knn
from fastssl.planning.schedule import Range, at_size
from fastssl.training import checkpoint, memory, run_folder
from fastssl.training import log as logs
from fastssl.training.bottleneck import HOST_STAGES, BottleneckReport, StageTimes
from fastssl.training.build import Setup, join
from fastssl.training.monitor import Monitor
from fastssl.training.stopwatch import StepClock
from loaders import Batch

PART_SECONDS, LOOP_SECONDS = 2.0, 8.0  # of measuring: each part alone, the loop
_BLOCKS = 5  # parts of a measurement, between which the spread is seen


def timed(do: Callable[[], object], wait: Callable[[], None], seconds: float) -> Range:
    """Seconds per call of `do`, measured for about `seconds` (and a call more) in blocks; `wait` ends each block.

    The figure is the mean, as predictions are sums of such figures.
    """
    start = time.perf_counter()
    do()
    wait()
    once = time.perf_counter() - start
    each, took = max(1, round(seconds / _BLOCKS / once)), []
    for _ in range(_BLOCKS if _BLOCKS * once < 2 * seconds else 2):
        start = time.perf_counter()
        for _ in range(each):
            do()
        wait()
        took.append((time.perf_counter() - start) / each)
    return Range(sum(took) / len(took), min(took), max(took))


class Neighbours:
    """Other programs on the machine, from when this is made on."""

    def __init__(self) -> None:
        self.began = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds on the clock, CPU seconds of all programs and of this one; None without /proc/stat."""
        try:
            ticks = [int(word) for word in Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]]
        except (OSError, ValueError, IndexError):
            return None
        idle = ticks[3] + ticks[4]  # with waiting for disks
        return time.perf_counter(), (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK"), time.process_time()

    def cores(self) -> float:
        """Cores that other programs kept busy, if less than a tenth of the machine was idle; else 0."""
        if self.began is None or (now := self._now()) is None:
            return 0.0
        seconds, everybody, own = (b - a for a, b in zip(self.began, now, strict=True))
        return max(0.0, everybody - own) / seconds if everybody > 0.9 * seconds * (os.cpu_count() or 1) else 0.0


class RunBench:
    """The parts of a run, made in an empty `folder` that is not the run's, and timed."""

    def __init__(self, config: RunConfig, folder: Path):
        start = time.perf_counter()
        self.folder = folder
        self.config = configs.replace(at_size(config, config.data.size), out=folder, resume=False, overwrite=False)
        self.setup = Setup(self.config, *join(self.config))
        self.loader = self.setup.loader
        self.progress = self.setup.progress(0)
        self.batches = self.loader.endless()
        self.batch = next(self.batches)  # valid until the next one is asked for
        self.memory = self._first_step()
        self.setup.wait()
        first = time.perf_counter()
        self.step(self.batch)
        self.setup.wait()
        self.start = 2 * first - start - time.perf_counter()  # the first step, which compiles, less an ordinary one

    def _first_step(self) -> memory.StepMemory:
        step = self.setup.step
        try:
            return memory.measured_step(step, self.batch, self.progress, self.loader)[1]
        except torch.OutOfMemoryError as error:
            raise memory.out_of_memory(step, self.batch, self.progress, error) from error

    def step(self, batch: Batch) -> None:
        """Train on a batch."""
        self.setup.step(batch, self.progress)

    def step_alone(self) -> Range:
        """Seconds per step on one and the same batch, the first: before another batch is asked for."""
        return timed(lambda: self.step(self.batch), self.setup.wait, PART_SECONDS)

    def loader_alone(self) -> tuple[Range, dict[str, float]]:
        """Seconds per batch, and milliseconds per image of the loader's stages."""
        for _ in range(self.loader.num_slots):  # batches that were prepared beforehand
            next(self.batches)
        times = StageTimes(self.loader, StepClock(self.setup.device))
        seconds = timed(lambda: next(self.batches), self.setup.wait, PART_SECONDS)
        times.stop()
        return seconds, {name: 1000 * times.stats[name] / max(1, times.stats["images"]) for name in HOST_STAGES}

    def loop(self, *, ahead: bool = True) -> tuple[Range, BottleneckReport]:
        """Seconds per step of the training loop, and where they went.

        ahead: the loader is so slow that batches prepared beforehand matter.
        """
        for _ in range(self.loader.num_slots + 1 if ahead else 1):
            self.step(next(self.batches))
        self.setup.wait()
        clock, steps = StepClock(self.setup.device), 0
        times, start = StageTimes(self.loader, clock), time.perf_counter()

        def advance() -> None:
            nonlocal steps
            batch = next(self.batches)
            with clock:
                self.step(batch)
            steps += 1

        seconds = timed(advance, self.setup.wait, LOOP_SECONDS)
        took = time.perf_counter() - start
        times.stop()
        return seconds, times.report(steps * self.loader.batch_size, took)

    def write(self) -> tuple[float, float, int, int]:
        """Seconds to write a checkpoint and the run's other files, bytes of a checkpoint and of the weights."""
        start = time.perf_counter()
        run_folder.begin(self.folder, self.config, self.setup.reader, self.setup.spec)
        opened = time.perf_counter()
        checkpoint.save(self.folder, checkpoint.state_of(self.setup))
        saved = time.perf_counter()
        export.save_weights(self.folder / export.NAME, self.setup.method.backbone, {})
        logs.save_curves(self.folder / run_folder.CURVES, [], 1.0)
        files = time.perf_counter() - saved + opened - start
        sizes = [os.path.getsize(self.folder / name) for name in (checkpoint.NAME, export.NAME)]
        return saved - opened, files, sizes[0], sizes[1]

    def knn(self) -> float:
        """Seconds of one evaluation of the monitor, derived from some of its images and votes; 0 without --val."""
        setup, run = self.setup, self.config.run
        if setup.val_reader is None:
            return 0.0
        monitor = Monitor(setup)
        bank, queries = min(len(setup.reader), run.knn_bank), len(setup.val_reader)
        images = bank + queries
        if run.recalibrate_bn:
            images = 2 * images + min(len(setup.reader), run.recalibrate_bn)
        num, took = min(8, bank), 0.0
        while took < PART_SECONDS and (num < bank or not took):
            fewer, less = num, took
            num = min(4 * num, bank)
            start = time.perf_counter()
            features, _ = monitor.features(setup.method.backbone, setup.reader, num)
            setup.wait()
            took = time.perf_counter() - start
        # The difference of two measurements leaves out what any number of images costs.
        each = max(0.0, took - less) / (num - fewer) if less else took / num
        few = min(queries, 256)
        bank_ND = F.normalize(torch.randn(bank, features.shape[1], device=features.device), dim=1)
        label_N = torch.arange(bank, device=features.device) % 1000
        start = time.perf_counter()
        knn.accuracy((bank_ND, label_N), (bank_ND[:few], label_N[:few]), monitor.settings)
        votes = (time.perf_counter() - start) * queries / few
        return took + each * (images - num) + votes * (2 if run.recalibrate_bn else 1)

    def __enter__(self) -> RunBench:
        return self

    def __exit__(self, *exc: object) -> None:
        """Stop the loader's threads."""
        self.batches.close()
        self.loader.close()
