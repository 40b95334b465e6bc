"""What a run will take: its parts, timed on this machine, and how often it has each.

    the loader alone        read, decode, crop (, augment)        explains
    the step alone          one batch over and over                explains
    both together           the training loop itself               what hours are predicted from

On a GPU the loop is as slow as the slower of the two; on a CPU they share the cores, so that it is slower than both.
Only the loop itself tells. It is made of the run's own parts (`train.Trainer`), in a folder that is not the run's.
What a run does besides (start, checkpoints, kNN monitor) is timed once and counted.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console

from fastssl import export
from fastssl.config import schema as configs
from fastssl.config.schema import Config
from fastssl.evaluate import knn
from fastssl.evaluate.features import extract
from fastssl.planning.schedule import Range, at_size
from fastssl.progress import Progress
from fastssl.training import bottleneck, checkpoint, memory, run_folder
from fastssl.training import log as logs
from fastssl.training.trainer import Trainer
from loaders import Batch

PART_SECONDS, LOOP_SECONDS = 2.0, 8.0  # of measuring: each part alone, the loop
_BLOCKS = 5  # that a measurement is cut into; the spread is theirs


# ------------------------------------------------------------------ what a run is made of


# ------------------------------------------------------------------ measuring


def timed(do: Callable[[], object], wait: Callable[[], None], seconds: float) -> Range:
    """Seconds per call of `do`, measured for about `seconds` (and a call more) in blocks, which `wait` ends.

    The figure is the mean, as what is predicted from it is a sum.
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
        """Seconds on the clock, of CPU time of all programs, and of this one; None where the system does not say."""
        try:
            ticks = [int(word) for word in Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]]
        except (OSError, ValueError, IndexError):
            return None
        idle = ticks[3] + ticks[4]  # with waiting for disks
        return time.perf_counter(), (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK"), time.process_time()

    def cores(self) -> float:
        """How many cores they kept busy, if that left less than a tenth of the machine idle; else 0."""
        if self.began is None or (now := self._now()) is None:
            return 0.0
        seconds, everybody, own = (b - a for a, b in zip(self.began, now, strict=True))
        return max(0.0, everybody - own) / seconds if everybody > 0.9 * seconds * (os.cpu_count() or 1) else 0.0


class Bench:
    """The parts of a run, made in an empty `folder` that is not the run's, and timed."""

    def __init__(self, config: Config, folder: Path):
        start = time.perf_counter()
        config = configs.replace(at_size(config, config.data.size), out=folder, resume=False, overwrite=False)
        self.config, self.folder = config, folder
        self.trainer = Trainer(config, Console(quiet=True))
        self.loader, self.cuda = self.trainer.loader, self.trainer.device.type == "cuda"
        self.images = self.loader.batch_size
        self.batches = self.loader.endless()
        self.batch = next(self.batches)  # until the next one is asked for
        self.memory = self._first_step()
        self.wait()
        first = time.perf_counter()
        self._step(self.batch)
        self.wait()
        self.start = 2 * first - start - time.perf_counter()  # the first step, which compiles, less an ordinary one

    @property
    def _progress(self) -> Progress:
        steps = self.trainer.steps_per_epoch
        return Progress(0, self.config.optim.epochs * steps, steps)

    def _first_step(self) -> memory.Parts:
        step = self.trainer.train_step
        try:
            return memory.measured_step(step, self.batch, self._progress, self.loader)[1]
        except torch.OutOfMemoryError as error:
            raise memory.out_of_memory(step, self.batch, self._progress, error) from error

    def _step(self, batch: Batch) -> None:
        self.trainer.train_step(batch, self._progress)

    def wait(self) -> None:
        """Until the device is at rest."""
        if self.cuda:
            torch.cuda.synchronize(self.trainer.device)

    def loader_alone(self) -> tuple[Range, dict[str, float]]:
        """Seconds per batch, and milliseconds per image of the loader's stages."""
        for _ in range(self.loader.num_slots):  # what was prepared beforehand
            next(self.batches)
        before = self.loader.stats.snapshot()
        seconds = timed(lambda: next(self.batches), self.wait, PART_SECONDS)
        after = self.loader.stats.snapshot()
        took = {name: after[name] - before[name] for name in after}
        return seconds, {name: 1000 * took[name] / max(1, took["images"]) for name in bottleneck.HOST_STAGES}

    def step_alone(self) -> Range:
        """Seconds per step on one and the same batch, the first: before any other is asked for."""
        return timed(lambda: self._step(self.batch), self.wait, PART_SECONDS)

    def loop(self, *, ahead: bool = True) -> tuple[Range, bottleneck.Report]:
        """Seconds per step of the training loop, and where they went. `ahead`: the loader is slow enough for batches
        that were prepared beforehand to matter."""
        for _ in range(self.loader.num_slots + 1 if ahead else 1):
            self._step(next(self.batches))
        self.wait()
        clock, steps = bottleneck.StepClock(self.trainer.device), 0
        before, start = self.loader.stats.snapshot(), time.perf_counter()

        def advance() -> None:
            nonlocal steps
            batch = next(self.batches)
            with clock:
                self._step(batch)
            steps += 1

        seconds = timed(advance, self.wait, LOOP_SECONDS)
        took, after = time.perf_counter() - start, self.loader.stats.snapshot()
        report = bottleneck.report(
            {name: after[name] - before[name] for name in after},
            images=steps * self.images,
            seconds=took,
            network_seconds=clock.take(),
            workers=self.loader.workers,
            on_gpu=self.cuda,
        )
        return seconds, report

    def write(self) -> tuple[float, float, int, int]:
        """Seconds to write a checkpoint and the run's other files, bytes of a checkpoint and of the weights."""
        start = time.perf_counter()
        run_folder.begin(self.folder, self.config, self.trainer.reader, self.trainer.spec)
        opened = time.perf_counter()
        checkpoint.save(self.folder, self.trainer._state())
        saved = time.perf_counter()
        export.save_weights(self.folder / export.NAME, self.trainer.method.backbone, {})
        logs.save_curves(self.folder / run_folder.CURVES, [], 1.0)
        files = time.perf_counter() - saved + opened - start
        return saved - opened, files, *(os.path.getsize(self.folder / n) for n in (checkpoint.NAME, export.NAME))

    def knn(self) -> float:
        """Seconds of one evaluation of the monitor, from a few of its images and votes; 0 without --val."""
        trainer, run = self.trainer, self.config.run
        if trainer.val_reader is None:
            return 0.0
        bank, queries = min(len(trainer.reader), run.knn_bank), len(trainer.val_reader)
        images = bank + queries
        if run.recalibrate_bn:
            images = 2 * images + min(len(trainer.reader), run.recalibrate_bn)
        num, took = min(8, bank), 0.0
        while took < PART_SECONDS and (num < bank or not took):
            fewer, less = num, took
            num = min(4 * num, bank)
            start = time.perf_counter()
            features, _ = extract(trainer.method.backbone, trainer.reader, limit=num, **trainer.monitor.crops)
            self.wait()
            took = time.perf_counter() - start
        # Without what any number of images costs.
        each = max(0.0, took - less) / (num - fewer) if less else took / num
        few = min(queries, 256)
        bank_ND = F.normalize(torch.randn(bank, features.shape[1], device=features.device), dim=1)
        label_N = torch.arange(bank, device=features.device) % 1000
        start = time.perf_counter()
        knn.accuracy((bank_ND, label_N), (bank_ND[:few], label_N[:few]), trainer.monitor.settings)
        votes = (time.perf_counter() - start) * queries / few
        return took + each * (images - num) + votes * (2 if run.recalibrate_bn else 1)

    def peak(self) -> int:
        """Most memory in use so far, bytes: the GPU's, or the process's."""
        return torch.cuda.max_memory_allocated(self.trainer.device) if self.cuda else memory.peak_host_memory()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *exc: object) -> None:
        """Stop the loader's threads."""
        self.batches.close()
        self.loader.close()
