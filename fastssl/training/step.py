"""One training step: forward, backward, and the only `optimizer.step()` of the project.

Nothing in it waits for the device.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fastssl import processes
from fastssl.config.schema import RunConfig
from fastssl.device import Precision
from fastssl.methods.base import Method, Metrics
from fastssl.networks.micro_batch import MicroBatches, slices, use_micro_batches
from fastssl.processes import World
from fastssl.progress import Progress
from fastssl.training.optimizers import (
    clip_each_norm,
    lr_at,
    make_optimizer,
    scaled_lr,
    set_lr,
    set_weight_decay,
    weight_decay_at,
)
from loaders import Batch
from loaders.errors import UserError


class Step:
    """A training step: method (on `device`), optimiser, loss scaling. `step(batch, progress)` takes one."""

    def __init__(
        self, config: RunConfig, method: Method, device: torch.device, precision: Precision, world: World | None = None
    ):
        self.config, self.method, self.device, self.precision = config, method, device, precision
        self.world = world or World()
        self.micro = self._micro_batches()
        torch.backends.cudnn.benchmark = True  # shapes stay: the fastest convolution for each is looked for once
        self.base_lr = scaled_lr(config.optim, config.data.batch_size)
        self.optimizer = make_optimizer(method, config.optim, self.base_lr)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision.scale)
        if config.run.compile != "off" and (config.run.compile != "auto" or device.type == "cuda"):
            compile_method(method, mode="reduce-overhead" if config.run.compile == "reduce-overhead" else None)
        self.parallel = _in_parallel(method) if self.world.size > 1 else None
        self.forward: Callable[[Batch], tuple[Tensor, Metrics]] = self.parallel or method

    def _micro_batches(self) -> MicroBatches | None:
        images, num = self.config.run.micro_batch, self.config.data.batch_size // self.world.size
        if images is None or images >= num:
            return None
        if num % images:
            raise UserError(f"--micro-batch {images} does not divide the {num} images of a process: use a divisor")
        return use_micro_batches(self.method, self.method.image_networks(), images)

    def __call__(self, batch: Batch, progress: Progress) -> tuple[Tensor, Metrics]:
        """Train on a batch. Returns the loss and the method's metrics, without gradient, still on the device."""
        if self.config.run.compile == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()  # what the graphs returned in the last step may be overwritten
        self._set_schedules(progress)
        self.method.before_step(progress)
        loss, metrics = self._forward_backward(batch)
        self._clip()
        self.method.after_backward(progress)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step(progress)
        return loss, metrics

    def _clip(self) -> None:
        """Clip the gradients, together or each; nothing here waits for the device."""
        optim = self.config.optim
        if optim.clip_norm is None and optim.clip_each_norm is None:
            return
        self.scaler.unscale_(self.optimizer)
        if optim.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.method.parameters(), optim.clip_norm)
        if optim.clip_each_norm is not None:
            clip_each_norm(self.method.parameters(), optim.clip_each_norm)

    def _forward_backward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Compute the gradients of the batch's loss, the mean over all processes. Returns the loss and the metrics."""
        if self.micro is None:
            return self._backward(batch)
        # Gradients of micro-batches are added up in each process before the processes exchange anything.
        with self.parallel.no_sync() if self.parallel else contextlib.nullcontext():
            if self.method.separable:
                share = self.micro.images / len(batch.index)
                losses, parts = zip(*(self._backward(b, share) for b in slices(batch, self.micro.images)), strict=True)
                loss = share * functools.reduce(torch.add, losses)
                metrics = {k: share * functools.reduce(torch.add, [part[k] for part in parts]) for k in parts[0]}
            else:
                loss, metrics = self._backward(batch)
                self.micro.backward(lambda: self.precision.autocast(self.device))
        if self.world.size > 1:
            processes.average_gradients(self.method.parameters())
        return loss, metrics

    def _backward(self, batch: Batch, share: float = 1.0) -> tuple[Tensor, Metrics]:
        """Add the gradients of `share` times the loss."""
        with self.precision.autocast(self.device):
            loss, metrics = self.forward(batch)
        self.scaler.scale(loss if share == 1 else loss * share).backward()
        return loss.detach(), metrics

    def lr(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step, counted from 0."""
        return lr_at(self.config.optim, self.base_lr, step, steps_per_epoch)

    def _set_schedules(self, progress: Progress) -> None:
        optim, step, per_epoch = self.config.optim, progress.step, progress.steps_per_epoch
        set_lr(self.optimizer, self.lr(step, per_epoch))
        if optim.weight_decay_end is not None:
            set_weight_decay(self.optimizer, weight_decay_at(optim, step, per_epoch))

    def state_dict(self) -> dict[str, Any]:
        """Weights, buffers, optimiser and loss scale."""
        return {
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; other keys are ignored."""
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


def _in_parallel(method: Method) -> DistributedDataParallel:
    """The method with its gradients averaged over the processes. BatchNorm's running statistics are not exchanged: the
    checkpoint holds those of the main process."""
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters:  # torch 2.15
        return DistributedDataParallel(method, forward_sync_buffers=False)
    return DistributedDataParallel(method, broadcast_buffers=False)


def compile_method(method: Method, mode: str | None = None, **options: Any) -> None:
    """Compile the networks that see images, and `method.loss` as one graph: combinations, heads, targets, distances.
    Names in the state dict stay."""
    # One graph for every size of image: code for any size would be slower.
    options = {"mode": mode, "dynamic": False} | options
    # Imported by the attribute, here and not at start-up: torch._dynamo takes a second.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    method.loss = torch.compile(method.loss, **options)  # type: ignore[method-assign]  # this object's own loss
    for net in method.image_networks():
        net.compile(**options)
