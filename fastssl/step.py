"""One training step: forward, backward, and the only `optimizer.step()` of the project.

Nothing in it waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastssl.config import Config
from fastssl.core import pick_precision
from fastssl.dist import World
from fastssl.nn import need_plain_batch_norm
from fastssl.optim import lr_at, make_optimizer, scaled_lr, set_lr, set_weight_decay, weight_decay_at
from fastssl.progress import Progress
from loaders import Batch
from loaders.errors import UserError


class Step:
    """What a step is made with: method, optimiser, loss scaling. `step(batch, progress)` takes one."""

    def __init__(self, config: Config, method: nn.Module, device: torch.device, world: World | None = None):
        self.config, self.device, self.world = config, device, world or World()
        self.precision = pick_precision(config.run.precision, device)
        method.to(device, memory_format=torch.channels_last)
        if config.model.sync_bn and self.world.size > 1:
            if device.type != "cuda":
                raise UserError("--sync-bn needs CUDA, torch has none for CPUs: use --no-sync-bn")
            need_plain_batch_norm(method, "--sync-bn")
            method = nn.SyncBatchNorm.convert_sync_batchnorm(method)
        self.method = method
        self.base_lr = scaled_lr(config.optim, config.data.batch_size)
        self.optimizer = make_optimizer(method, config.optim, self.base_lr)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision.scale)
        if config.run.compile == "on" or (config.run.compile == "auto" and device.type == "cuda"):
            # The parts, not the whole: one graph serves all K views, and checkpoints keep their names.
            for child in method.children():
                child.compile()
        self.forward = method
        if self.world.size > 1:
            # BatchNorm's running statistics stay each process's own; the first one's are saved.
            self.forward = DistributedDataParallel(method, broadcast_buffers=False)

    def __call__(self, batch: Batch, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        """Train on a batch. Returns the loss and the method's metrics, without gradient, still on the device."""
        self._set_schedules(progress)
        self._hook("before_step", progress)
        with self.precision.autocast(self.device):
            loss, metrics = self.forward(batch)
        self.scaler.scale(loss).backward()
        clip_norm = self.config.optim.clip_norm
        if clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.method.parameters(), clip_norm)  # does not wait for the device
        self._hook("after_backward", progress)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._hook("after_step", progress)
        return loss.detach(), metrics

    def lr(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step, counted from 0."""
        return lr_at(self.config.optim, self.base_lr, step, steps_per_epoch)

    def _set_schedules(self, progress: Progress) -> None:
        optim, step, per_epoch = self.config.optim, progress.step, progress.steps_per_epoch
        set_lr(self.optimizer, self.lr(step, per_epoch))
        if optim.weight_decay_end is not None:
            set_weight_decay(self.optimizer, weight_decay_at(optim, step, per_epoch))

    def _hook(self, name: str, progress: Progress) -> None:
        """Call the method's `before_step`, `after_backward` or `after_step`, if it has it."""
        hook = getattr(self.method, name, None)
        if hook is not None:
            hook(progress)

    def state_dict(self) -> dict[str, Any]:
        """Weights, buffers, optimiser and loss scale."""
        return {
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse; other keys are ignored."""
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
