"""The training loop.

    for each step:  views -> method -> loss -> backward -> one step of the optimiser (`training.step`)

Nothing in the loop waits for the device but the logging step (`--log-every`), checkpoints and the monitor.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from fastssl import processes
from fastssl.config import schema as configs
from fastssl.config.command_line import default_folder
from fastssl.config.schema import RunConfig
from fastssl.methods.base import Metrics
from fastssl.training import checkpoint, memory, run_folder, summary
from fastssl.training import log as logs
from fastssl.training.bottleneck import StageTimes
from fastssl.training.build import Setup, join, make_views
from fastssl.training.monitor import Monitor
from fastssl.training.signals import StopSignal
from fastssl.training.stopwatch import StepClock, Stopwatch
from fastssl.training.summary import Result
from loaders import Batch
from loaders.errors import UserError

_REPORT_SECONDS = 60.0  # between bottleneck reports on the screen

OnStep = Callable[[int, Tensor, Metrics], object]


class NonFiniteLoss(UserError):
    """The loss or the weights are no longer numbers."""


class Trainer:
    """One run: its parts (`setup`), its position (`step`: steps done), and the loop.

    on_step: called after every step with the steps done, the loss and the method's metrics, both on the device.
    """

    def __init__(self, config: RunConfig, console: Console | None = None, on_step: OnStep | None = None):
        self.config, self.on_step = config, on_step
        self.folder = Path(config.run.out) if config.run.out else default_folder(config)
        device, world = join(config)
        self.state = checkpoint.load(self.folder) if config.run.resume else None
        if self.state is None:
            run_folder.check_folder(self.folder, config.run.overwrite)
        # Backends agree, but not to the last bit: a run with --backend auto goes on with the one that it began with.
        backend = self.state["backend"] if self.state and config.data.backend == "auto" else None
        self.setup = Setup(config, device, world, backend)
        self.main = world.main
        self.console = console or Console()
        self.log = logs.Log(self.folder, self.console if self.main else Console(quiet=True))
        self.monitor = Monitor(self.setup)
        self.stop = StopSignal(world)
        self.stopwatch = Stopwatch(lambda: (self.step, self.setup.loader.stats.snapshot()["wait"]))
        self.clock = StepClock(device)
        self.step = 0
        self.last_loss: Tensor | None = None
        self.reported = -math.inf  # when the bottleneck report was last shown

    def run(self) -> Result:
        """Train to the end. Returns what the summary shows."""
        with self.setup:
            if self.main:
                run_folder.begin(self.folder, self.config, self.setup.reader, self.setup.spec)
            summary.announce(self.setup, self.log, self.folder)
            self._resume()
            with self.stop, self.log, memory.advice(self.config):
                self._loop()
            return self._finish()

    def _loop(self) -> None:
        setup, run = self.setup, self.config.run
        total, per_epoch = setup.total_steps, setup.steps_per_epoch
        self.stopwatch.start()
        if self.step == 0:
            self._evaluate()
        self.saved = time.perf_counter()
        while self.step < total and not self.stop.reason:
            epoch, first = divmod(self.step, per_epoch)
            self._change_size(epoch)
            times, began, seconds = StageTimes(setup.loader, self.clock), self.step, self.stopwatch.seconds
            for batch in setup.loader.epoch(epoch, first, ahead=self._same_views_next(epoch)):
                metrics = self._train(batch)
                log_now = self.step % run.log_every == 0 or self.step >= total
                if log_now:
                    self._log(metrics)
                self.stop.agree(log_now)
                if self.step >= total or self.stop.reason:
                    break
                if self._checkpoint_due():
                    self._save()
            if not self.stop.reason:
                self.stopwatch.lap()
                self._report(times, self.step - began, self.stopwatch.seconds - seconds)
                epochs, left = divmod(self.step, per_epoch)
                if self.step >= total or (run.knn_every and not left and epochs % run.knn_every == 0):
                    self._evaluate()
            self._save()

    # ------------------------------------------------------------------ parts of the loop

    def _train(self, batch: Batch) -> Metrics:
        """Take a step."""
        step, progress = self.setup.step, self.setup.progress(self.step)
        needed: memory.StepMemory | None = None
        try:
            with self.clock:
                if self.last_loss is None:  # the first step of this process
                    (loss, metrics), needed = memory.measured_step(step, batch, progress, self.setup.loader)
                else:
                    loss, metrics = step(batch, progress)
        except torch.OutOfMemoryError as error:
            self.console.print("out of GPU memory: trying which micro-batch fits, for a minute or so", highlight=False)
            raise memory.out_of_memory(step, batch, progress, error) from error
        self.step += 1
        self.last_loss = loss
        if needed is not None and self.main:
            self.log.say(f"memory: {needed}")
            self.log.write({"step": self.step, "memory_bytes": dataclasses.asdict(needed)})
        if self.on_step is not None:
            self.on_step(self.step, loss, metrics)
        return metrics

    def _same_views_next(self, epoch: int) -> bool:
        """True if an epoch with views of the same size follows, so that its first batches can be made ahead."""
        sizes = (configs.size_at(self.config, e) for e in (epoch, epoch + 1))
        return epoch + 1 < self.config.optim.epochs and len({*sizes}) == 1

    def _change_size(self, epoch: int) -> None:
        """Change the loader if views of another size are due."""
        size = configs.size_at(self.config, epoch)
        spec = make_views(self.config, size)
        if spec != self.setup.spec:
            with self.stopwatch.paused():
                self.setup.change_views(spec)
            self.log.say(f"views of {size} px from here on")

    def _log(self, metrics: Metrics) -> None:
        """Log the step. This waits for the device."""
        loss = self._finite_loss()
        self.clock.take()  # the device is at rest; an epoch's events would be tens of thousands
        interval = self.stopwatch.lap()
        images_per_s = interval.steps * self.config.data.batch_size / interval.seconds
        entry = {
            "step": self.step,
            "epoch": self.step / self.setup.steps_per_epoch,
            "loss": loss,
            **{name: value.item() for name, value in metrics.items()},
            "lr": self.setup.step.lr(self.step - 1, self.setup.steps_per_epoch),
            "images_per_s": images_per_s,
            "views_per_s": images_per_s * self.setup.spec.K,
            "wait_share": interval.waited / interval.seconds,
            "seconds": self.stopwatch.seconds,
        }
        if self.main:
            self.log.write(entry)
            line = summary.live_line(self.setup, entry, self.monitor.last)
            self.log.show(line, force=self.step == self.setup.total_steps)

    def _report(self, times: StageTimes, steps: int, seconds: float) -> None:
        """Log where the epoch's time went; show it if the last report on the screen is a while ago."""
        if not self.main:
            return
        times.stop()
        report = times.report(steps * self.setup.loader.batch_size, seconds)
        entry = {"step": self.step, "epoch": self.step / self.setup.steps_per_epoch, "ms_per_image": report.stages}
        self.log.write(entry | {"limit": report.limit, "capacity": report.capacity})
        left = self.setup.total_steps - self.step
        if left and time.perf_counter() - self.reported < _REPORT_SECONDS:
            return
        self.reported = time.perf_counter()
        for line in report.lines(left * seconds / steps):
            self.log.say(line)

    def _evaluate(self) -> None:
        """Ask the kNN monitor, in the main process; the others wait."""
        if self.setup.val_reader is None:
            return
        with self.stopwatch.paused():
            if self.main:
                entry, line = self.monitor()
                epoch = self.step / self.setup.steps_per_epoch
                self.log.write({"step": self.step, "epoch": epoch} | entry)
                self.log.say(f"epoch {epoch:g}: {line}")
            processes.barrier(self.setup.world)

    def _finite_loss(self) -> float:
        """The last step's loss. Raises NonFiniteLoss if it is no number."""
        assert self.last_loss is not None
        loss = self.last_loss.item()
        if not math.isfinite(loss):
            epoch = self.step / self.setup.steps_per_epoch
            raise NonFiniteLoss(
                f"the loss is {loss} at step {self.step} (epoch {epoch:.2f}); the last good checkpoint is kept in "
                f"{self.folder}: lower --lr (now {self.setup.step.base_lr:g} at this batch size)"
            )
        return loss

    # ------------------------------------------------------------------ checkpoint, resume, end

    def _checkpoint_due(self) -> bool:
        minutes = self.config.run.checkpoint_minutes
        return self.main and minutes > 0 and time.perf_counter() - self.saved >= 60 * minutes

    def _save(self) -> None:
        """Write the checkpoint, unless the weights have gone bad."""
        if self.main:
            self._finite_loss()
            if not all(p.isfinite().all() for p in self.setup.method.parameters()):
                raise NonFiniteLoss(
                    f"weights are not finite after step {self.step}; the last good checkpoint stays in {self.folder}: "
                    "lower --lr or use --precision fp32"
                )
            with self.stopwatch.paused():
                position = {"step": self.step, "seconds": self.stopwatch.seconds}
                knn = {"best_knn": self.monitor.best, "last_knn": self.monitor.last}
                checkpoint.save(self.folder, checkpoint.state_of(self.setup) | position | knn)
        self.saved = time.perf_counter()

    def _resume(self) -> None:
        """Go on from the checkpoint, if there is one."""
        if self.state is None:
            return
        state, self.state = self.state, None
        checkpoint.restore(self.setup, state, self.folder)
        self.step, self.stopwatch.seconds = state["step"], state["seconds"]
        self.monitor.best, self.monitor.last = state["best_knn"], state["last_knn"]
        if self.main:
            logs.truncate_metrics(self.folder / logs.METRICS, self.step)
            epoch = self.step / self.setup.steps_per_epoch
            self.log.say(f"resumed at step {self.step} of {self.setup.total_steps} (epoch {epoch:.2f})")

    def _finish(self) -> Result:
        """Write what a finished run leaves behind, and show the summary."""
        seconds = self.stopwatch.seconds
        result: Result = {
            "steps": self.step,
            "hours": seconds / 3600,
            "images_per_s": self.step * self.config.data.batch_size / seconds if seconds else 0.0,
            "peak_memory_gb": memory.peak_memory(self.setup.device) / 1e9,
            "best_knn": self.monitor.best,
            "stopped": self.stop.reason,
            "folder": self.folder,
        }
        if not self.main:
            return result
        entries = logs.read_metrics(self.folder / logs.METRICS)
        logs.save_curves(self.folder / run_folder.CURVES, entries, self.setup.method.healthy_std)
        if self.stop.reason:
            self.log.say(
                f"stopped by {self.stop.reason} after step {self.step}; continue with: "
                f"fastssl-train --out {self.folder} --resume"
            )
            return result
        run_folder.save_weights(self.folder, self.setup, self.monitor)
        logs.table(self.console, "done", summary.rows(self.setup, result, entries, self.monitor.last))
        return result


def train(config: RunConfig, console: Console | None = None, on_step: OnStep | None = None) -> Result:
    """Run one configuration from start (or checkpoint) to end.

    on_step: called after every step, as by `Trainer`. Raises UserError for input that cannot be used, before anything
    is written.
    """
    trainer = Trainer(config, console, on_step)
    try:
        return trainer.run()
    finally:
        processes.finish(trainer.setup.world)
