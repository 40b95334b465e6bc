"""Parameter groups and learning-rate schedules."""

from __future__ import annotations

import math

import torch
from torch import nn

from fastssl.config import Optim


def scaled_lr(optim: Optim, batch_size: int) -> float:
    """The linear scaling rule: lr * batch_size / lr_batch_size (Goyal et al. 2017)."""
    return optim.lr * batch_size / optim.lr_batch_size


def lr_at(optim: Optim, base_lr: float, step: int, steps_per_epoch: int) -> float:
    """The learning rate of one step (counted from 0 over the whole run).

    Cosine, 1/2 lr (1 + cos(pi e / E)), with e in whole epochs (`schedule="epoch"`, SimSiam's code) or in fractions of
    one (`schedule="step"`), after a linear warm-up from lr / warm-up steps.
    """
    warmup_steps = round(optim.warmup_epochs * steps_per_epoch)
    if step < warmup_steps:
        return base_lr * (step + 1) / warmup_steps
    epoch = step // steps_per_epoch if optim.schedule == "epoch" else step / steps_per_epoch
    start = optim.warmup_epochs
    progress = max(0.0, epoch - start) / (optim.epochs - start)
    return 0.5 * base_lr * (1 + math.cos(math.pi * progress))


def make_sgd(method: nn.Module, optim: Optim, base_lr: float) -> torch.optim.SGD:
    """SGD over the method's parameter groups, as one fused kernel. Groups keep their `fixed_lr` mark."""
    default = [{"params": list(method.parameters()), "fixed_lr": False}]
    groups = method.param_groups() if hasattr(method, "param_groups") else default
    groups = [g | {"params": [p for p in g["params"] if p.requires_grad]} for g in groups]
    covered = sorted(id(p) for g in groups for p in g["params"])
    if covered != sorted(id(p) for p in method.parameters() if p.requires_grad):
        raise ValueError("param_groups() of the method must hold every trainable parameter exactly once")
    return torch.optim.SGD(groups, lr=base_lr, momentum=optim.momentum, weight_decay=optim.weight_decay, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every group that is not marked `fixed_lr`."""
    for group in optimizer.param_groups:
        if not group["fixed_lr"]:
            group["lr"] = lr
