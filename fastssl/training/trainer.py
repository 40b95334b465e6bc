"""fastssl-train: build, loop, checkpoint.

    for each step:  views -> method -> loss -> backward -> one fused step of the optimiser (`training.step`)

Nothing in the loop waits for the device except the logging step (`--log-every`) and the checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import fastssl
from fastssl import export, processes
from fastssl.config import schema as configs
from fastssl.config.command_line import default_folder
from fastssl.config.schema import RunConfig
from fastssl.device import pick_device, pick_precision
from fastssl.evaluate.recalibrate import NAME as RECALIBRATED
from fastssl.progress import Progress
from fastssl.training import bottleneck, checkpoint, memory, run_folder
from fastssl.training import log as logs
from fastssl.training.build import make_method, make_views
from fastssl.training.monitor import Monitor
from fastssl.training.step import Step
from loaders import Batch, Loader
from loaders.dataset import open_data
from loaders.errors import UserError

_REPORT_SECONDS = 60.0  # between bottleneck reports on the screen


class NonFiniteLoss(UserError):
    """The loss or the weights are no longer numbers."""


class Trainer:
    """One run: what it is made of, where it stands, and the loop."""

    def __init__(self, config: RunConfig, console: Console):
        configs.validate(config)
        self.config, self.console = config, console
        self.device = pick_device(config.run.device)
        self.world = processes.init(self.device.type)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.precision = pick_precision(config.run.precision, self.device)
        if config.data.batch_size % self.world.size:
            raise UserError(
                f"--batch-size {config.data.batch_size} does not divide among {self.world.size} processes: "
                f"use a multiple of {self.world.size}"
            )
        config.method_options.check_batch(config.data.batch_size // self.world.size)
        # Everything that can be wrong with the input is found before anything is written.
        self.reader = open_data(config.data.data)
        self.val_reader = open_data(config.data.val) if config.data.val else None
        if self.val_reader is not None and config.run.knn_k > min(len(self.reader), config.run.knn_bank):
            raise UserError(f"--knn-k {config.run.knn_k} neighbours asked of {len(self.reader)} images: use fewer")
        self.spec = make_views(config, configs.size_at(config, 0))
        self.method = make_method(config)
        self.folder = Path(config.run.out) if config.run.out else default_folder(config)
        self.state: dict[str, Any] | None = None
        if config.run.resume:
            self.state = checkpoint.load(self.folder)
        else:
            run_folder.check_folder(self.folder, config.run.overwrite)
        self.loader = self._open_loader()
        self.train_step = Step(config, self.method, self.device, self.world)
        self.monitor = Monitor(config, self.reader, self.val_reader, self.device, self.precision.dtype)
        self.clock = bottleneck.StepClock(self.device)
        self.reported = -math.inf  # when the bottleneck report was last shown
        self.step = 0  # steps done
        self.seconds = 0.0  # spent in this run, over all its resumptions
        self.last_loss: torch.Tensor | None = None  # of the last step, on the device
        self.memory: memory.Parts | None = None  # what the first step of this process took
        self.asked: str | None = None  # the signal that asked this process to stop
        self.stopping: str | None = None  # and that all processes know of

    def _open_loader(self, backend: str | None = None) -> Loader:
        data, world = self.config.data, self.world
        backend = backend or data.backend
        if backend == "auto" and self.state is not None:
            # The backends agree, but not to the last bit: a run goes on with the one that it began with.
            backend = self.state["backend"]
        with processes.main_first(world):  # measuring undisturbed, and all processes with one result
            return Loader(
                self.reader,
                self.spec,
                batch_size=data.batch_size // world.size,
                device=self.device,
                backend=backend,
                seed=self.config.run.seed,
                rank=world.rank,
                world=world.size,
                workers=data.workers,
                prefetch=data.prefetch,
                order=data.order,
                page_window=data.page_window,
                dtype=self.precision.dtype or torch.float32,
                on_bad_sample=data.on_bad_sample,
                views_ahead=self.config.run.micro_batch is None,  # else batches are large, and memory is scarce
            )

    @property
    def steps_per_epoch(self) -> int:
        return len(self.loader)

    @property
    def total_steps(self) -> int:
        """Steps to do in all."""
        total = self.config.optim.epochs * self.steps_per_epoch
        return min(total, self.config.run.max_steps or total)

    # ------------------------------------------------------------------ the loop

    def run(self) -> dict[str, Any]:
        """Train to the end. Returns what the summary shows."""
        config = self.config
        if self.world.main:
            run_folder.begin(self.folder, config, self.reader, self.spec)
        self.log = logs.Log(self.folder, self.console if self.world.main else Console(quiet=True))
        self._announce()
        self._resume()
        previous = {s: signal.signal(s, self._ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        self.log.start()
        try:
            if self.step == 0:
                self._knn()
            self.last_checkpoint = time.perf_counter()
            self._start_clock(self.last_checkpoint)
            started = self.step
            while self.step < self.total_steps and not self.stopping:
                epoch, first = divmod(self.step, self.steps_per_epoch)
                self._set_size(configs.size_at(config, epoch))
                self._begin_epoch()
                goes_on = epoch + 1 < config.optim.epochs
                goes_on &= configs.size_at(config, epoch) == configs.size_at(config, epoch + 1)
                for batch in self.loader.epoch(epoch, first, ahead=goes_on):
                    with self.clock:
                        metrics = self._advance(batch)
                    if self.step == started + 1:
                        self._show_memory()
                    logging = self.step % config.run.log_every == 0 or self.step == self.total_steps
                    if logging:
                        self._log(metrics)
                    self._agree_to_stop(logging)
                    if self.step >= self.total_steps or self.stopping:
                        break
                    if self._checkpoint_due():
                        self._save()
                if self.stopping:
                    break
                self._report()
                ended = self.step % self.steps_per_epoch == 0
                last = self.step >= self.total_steps
                epochs_done = self.step // self.steps_per_epoch
                if last or (ended and config.run.knn_every and epochs_done % config.run.knn_every == 0):
                    self._knn()
                if ended or last:
                    self._save()
            if self.stopping:
                self._save()
        except torch.OutOfMemoryError as error:  # not of a step, which says more: of the loader, or of the monitor
            raise UserError(
                f"out of GPU memory beside the training step, with --batch-size {config.data.batch_size} and "
                f"{self.spec.K} views of {config.data.size} px: try a smaller --prefetch or --batch-size"
                f"{'' if config.run.micro_batch else ', or --micro-batch, which makes the views late'}"
            ) from error
        finally:
            self.log.stop()
            self.loader.close()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self._finish()

    def _advance(self, batch: Batch) -> dict[str, torch.Tensor]:
        """One step; returns the method's metrics, still on the device."""
        per_epoch = self.steps_per_epoch
        progress = Progress(self.step, self.config.optim.epochs * per_epoch, per_epoch)
        try:
            if self.memory is None:
                (self.last_loss, metrics), self.memory = memory.measured_step(
                    self.train_step, batch, progress, self.loader
                )
            else:
                self.last_loss, metrics = self.train_step(batch, progress)
        except torch.OutOfMemoryError as error:
            self.console.print("out of GPU memory: trying which micro-batch fits, for a minute or so", highlight=False)
            raise memory.out_of_memory(self.train_step, batch, progress, error) from error
        self.step += 1
        return metrics

    def _show_memory(self) -> None:
        if self.world.main:
            self.log.say(f"memory: {self.memory}")
            self.log.write({"step": self.step, "memory_bytes": dataclasses.asdict(self.memory)})

    def _log(self, metrics: dict[str, torch.Tensor]) -> None:
        """The one place in the loop that waits for the device."""
        loss = self._finite_loss()
        self.clock.take()  # the device is at rest; an epoch's events would be tens of thousands
        now, stats = time.perf_counter(), self.loader.stats.snapshot()
        seconds = now - self.mark
        steps = self.step - self.marked_step
        images_per_s = steps * self.config.data.batch_size / seconds
        entry = {
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            "loss": loss,
            **{name: value.item() for name, value in metrics.items()},
            "lr": self.train_step.lr(self.step - 1, self.steps_per_epoch),
            "images_per_s": images_per_s,
            "views_per_s": images_per_s * self.spec.K,
            "wait_share": (stats["wait"] - self.marked_wait) / seconds,
            "seconds": self.seconds + seconds,
        }
        self._mark()
        if self.world.main:
            self.log.write(entry)
            self._show(entry)

    def _set_size(self, size: int) -> None:
        """Another loader, if views of another size are asked for."""
        spec = make_views(self.config, size)
        if spec == self.spec:
            return
        with self._off_the_clock():
            self.loader.close()
            self.spec, backend = spec, self.loader.backend.name
            self.loader = self._open_loader(backend)
        self.log.say(f"views of {size} px from here on")

    def _begin_epoch(self) -> None:
        self.epoch_began = (self.step, self.seconds, self.clock.take(), self.loader.stats.snapshot())

    def _report(self) -> None:
        """Where the epoch's time went: into metrics.jsonl, and on the screen, but not every few seconds."""
        self._mark()
        step, seconds, network, stats = self.epoch_began
        if self.step == step or not self.world.main:
            return
        now = self.loader.stats.snapshot()
        report = bottleneck.report(
            {name: now[name] - stats[name] for name in now},
            images=(self.step - step) * self.loader.batch_size,
            seconds=self.seconds - seconds,
            network_seconds=self.clock.take() - network,
            workers=self.loader.workers,
            on_gpu=self.device.type == "cuda",
        )
        entry = {"step": self.step, "epoch": self.step / self.steps_per_epoch, "ms_per_image": report.stages}
        self.log.write(entry | {"limit": report.limit, "capacity": report.capacity})
        if time.perf_counter() - self.reported < _REPORT_SECONDS and self.step < self.total_steps:
            return
        self.reported = time.perf_counter()
        per_step = (self.seconds - seconds) / (self.step - step)
        for line in report.lines((self.total_steps - self.step) * per_step):
            self.log.say(line)

    def _show(self, entry: dict[str, Any]) -> None:
        config = self.config
        left = (self.total_steps - self.step) * config.data.batch_size / entry["images_per_s"]
        parts = [
            f"epoch {entry['epoch']:.2f}/{config.optim.epochs}",
            f"loss {entry['loss']:.4f}",
            f"{logs.figures(entry['images_per_s'])} images/s",
            f"{logs.figures(entry['views_per_s'])} views/s",
            f"wait {100 * entry['wait_share']:.1f} %",
        ]
        if "feature_std" in entry:
            parts.append(f"std {entry['feature_std']:.4f} (healthy {self.healthy_std:.4f})")
        if self.monitor.last is not None:
            parts.append(f"kNN {self.monitor.last:.1f} %")
        parts.append(f"ETA {logs.duration(left)}")
        self.log.show("  ".join(parts), force=self.step == self.total_steps)

    @property
    def healthy_std(self) -> float:
        """1/sqrt(d): the feature std of outputs spread evenly over the sphere (SimSiam section 4.1)."""
        return self.method.healthy_std

    def _mark(self) -> None:
        """Begin a new interval of measuring speed."""
        now = time.perf_counter()
        self.seconds += now - self.mark
        self._start_clock(now)

    def _start_clock(self, now: float) -> None:
        self.mark, self.marked_step = now, self.step
        self.marked_wait = self.loader.stats.snapshot()["wait"]

    @contextlib.contextmanager
    def _off_the_clock(self) -> Iterator[None]:
        """What happens inside counts neither as training time nor in images/s."""
        self._mark()
        yield
        self._start_clock(time.perf_counter())

    def _finite_loss(self) -> float:
        loss = self.last_loss.item()
        if not math.isfinite(loss):
            raise NonFiniteLoss(
                f"the loss is {loss} at step {self.step} (epoch {self.step / self.steps_per_epoch:.2f}); the last good "
                f"checkpoint is kept in {self.folder}: lower --lr (now {self.train_step.base_lr:g} at this batch size)"
            )
        return loss

    # ------------------------------------------------------------------ kNN, checkpoints

    def _knn(self) -> None:
        """Ask the monitor."""
        if self.val_reader is None:
            return
        with self._off_the_clock():
            if self.world.main:
                self._knn_of_main()
            processes.barrier(self.world)

    def _knn_of_main(self) -> None:
        entry, line = self.monitor(self.method.backbone)
        epoch = self.step / self.steps_per_epoch
        self.log.write({"step": self.step, "epoch": epoch} | entry)
        self.log.say(f"epoch {epoch:g}: {line}")

    def _checkpoint_due(self) -> bool:
        minutes = self.config.run.checkpoint_minutes
        return self.world.main and minutes > 0 and time.perf_counter() - self.last_checkpoint >= 60 * minutes

    def _save(self) -> None:
        """Write the checkpoint, unless the weights have gone bad."""
        if self.world.main:
            if self.last_loss is not None:
                self._finite_loss()
            if not all(p.isfinite().all() for p in self.method.parameters()):
                raise NonFiniteLoss(
                    f"weights are not finite after step {self.step}; the last good checkpoint stays in {self.folder}: "
                    "lower --lr or use --precision fp32"
                )
            with self._off_the_clock():
                checkpoint.save(self.folder, self._state())
        self.last_checkpoint = time.perf_counter()

    def _state(self) -> dict[str, Any]:
        return {
            "config": configs.to_dict(self.config),
            "step": self.step,
            "backend": self.loader.backend.name,
            "steps_per_epoch": self.steps_per_epoch,
            "num_samples": len(self.reader),
            "seconds": self.seconds,
            "best_knn": self.monitor.best,
            "last_knn": self.monitor.last,
            **self.train_step.state_dict(),
            "threads": torch.get_num_threads(),
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def _resume(self) -> None:
        self._start_clock(time.perf_counter())
        if self.state is None:
            return
        state, self.state = self.state, None
        if (state["num_samples"], state["steps_per_epoch"]) != (len(self.reader), self.steps_per_epoch):
            raise UserError(
                f"{self.config.data.data} holds {len(self.reader)} images, the run in {self.folder} began with "
                f"{state['num_samples']}: resume with the same data"
            )
        self.train_step.load_state_dict(state)
        torch.set_rng_state(state["rng"])
        if self.device.type == "cpu":
            # Sums are split among the threads: another number of them would change the losses' last bits.
            torch.set_num_threads(state["threads"])
        if state["rng_cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng_cuda"], self.device)
        self.step = self.marked_step = state["step"]
        self.seconds = state["seconds"]
        self.monitor.best, self.monitor.last = state["best_knn"], state["last_knn"]
        if self.world.main:
            logs.truncate_metrics(self.folder / logs.METRICS, self.step)
            self.log.say(
                f"resumed at step {self.step} of {self.total_steps} (epoch {self.step / self.steps_per_epoch:.2f})"
            )

    def _ask_to_stop(self, number: int, _frame: object) -> None:
        name = signal.Signals(number).name
        # Asked twice: at once, from the last checkpoint. (torchrun passes SIGINT on as a SIGTERM, too.)
        if self.asked and (self.asked == name or self.world.size == 1):
            raise KeyboardInterrupt
        self.asked = name

    def _agree_to_stop(self, logging: bool) -> None:
        """Several processes stop after the same step, which is one that waits for the device anyway."""
        if self.world.size == 1:
            self.stopping = self.asked
        elif logging and processes.any_process(self.world, self.asked is not None):
            self.stopping = self.asked or "another process"

    # ------------------------------------------------------------------ beginning and end

    def _announce(self) -> None:
        config, count = self.config, sum(p.numel() for p in self.method.backbone.parameters())
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        self.log.say(
            f"{config.model.method}, {config.model.backbone} ({count / 1e6:.1f} M parameters), "
            f"{len(self.reader)} images, {self.spec.K} views of {config.data.size} px, batch {config.data.batch_size}, "
            f"learning rate {self.train_step.base_lr:g}, {config.optim.epochs} epochs of {self.steps_per_epoch} steps"
        )
        processes = f", {self.world.size} processes" if self.world.size > 1 else ""
        self.log.say(f"{name}, {self.precision}{processes}; run folder {self.folder}")
        why = f" ({self.loader.choice.why})" if self.loader.choice else ""
        self.log.say(f"backend {self.loader.backend.name}{why}")

    def _finish(self) -> dict[str, Any]:
        hours = self.seconds / 3600
        images = self.step * self.config.data.batch_size
        on_gpu = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if on_gpu else memory.peak_host_memory()
        result = {
            "steps": self.step,
            "hours": hours,
            "images_per_s": images / self.seconds if self.seconds else 0.0,
            "peak_memory_gb": peak / 1e9,
            "best_knn": self.monitor.best,
            "stopped": self.stopping,
            "folder": self.folder,
        }
        if not self.world.main:
            return result
        entries = logs.read_metrics(self.folder / logs.METRICS)
        logs.save_curves(self.folder / run_folder.CURVES, entries, self.healthy_std)
        if self.stopping:
            self.log.say(
                f"stopped by {self.stopping} after step {self.step}; continue with: "
                f"fastssl-train --out {self.folder} --resume"
            )
            return result
        about = {
            "program": f"fastssl {fastssl.__version__}",
            "backbone": self.config.model.backbone,
            "size": self.config.data.size,
            "config": configs.to_dict(self.config),
        }
        export.save_weights(self.folder / export.NAME, self.method.backbone, about)
        if self.config.run.recalibrate_bn:
            about |= {"recalibrate_bn": self.config.run.recalibrate_bn}
            export.save_weights(self.folder / RECALIBRATED, self.monitor.recalibrated(self.method.backbone), about)
        waits = [e["wait_share"] for e in entries if "wait_share" in e]
        rows = [
            ("training time", f"{logs.duration(self.seconds)} ({hours:.2f} h)"),
            ("images/s", f"{result['images_per_s']:.1f} ({result['images_per_s'] * self.spec.K:.1f} views/s)"),
            ("waiting for data", f"{100 * sum(waits) / max(1, len(waits)):.1f} %"),
            ("peak memory", f"{result['peak_memory_gb']:.2f} GB ({'GPU' if self.device.type == 'cuda' else 'host'})"),
        ]
        if self.loader.stats.replaced:
            rows.append(("broken samples replaced", str(self.loader.stats.replaced)))
        best, last = self.monitor.best, self.monitor.last
        if best is not None:
            first = next((e["knn"] for e in entries if "knn" in e), math.nan)
            rows.append(("kNN top-1", f"{best:.1f} % best, {last:.1f} % last, {first:.1f} % at the start"))
        if second := [e["knn_recalibrated"] for e in entries if "knn_recalibrated" in e]:
            rows.append(("  BatchNorm recalibrated", f"{max(second):.1f} % best, {second[-1]:.1f} % last"))
        rows.append(("weights", str(self.folder / export.NAME)))
        if self.config.run.recalibrate_bn:
            rows.append(("  BatchNorm recalibrated", str(self.folder / RECALIBRATED)))
        logs.summary(self.console, "done", rows)
        return result


def train(config: RunConfig, console: Console | None = None) -> dict[str, Any]:
    """Run one configuration from start (or checkpoint) to end.

    Returns steps, hours, images_per_s, peak_memory_gb, best_knn, stopped and folder. Raises UserError for input that
    cannot be used, before anything is written.
    """
    trainer = Trainer(config, console or Console())
    try:
        return trainer.run()
    finally:
        trainer.loader.close()
        processes.finish(trainer.world)
