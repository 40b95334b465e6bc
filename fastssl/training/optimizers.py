"""Optimisers, their parameter groups, and the schedules of learning rate and weight decay."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastssl.config.schema import Optim
from fastssl.methods.base import Method
from loaders.errors import UserError


def scaled_lr(optim: Optim, batch_size: int) -> float:
    """The linear scaling rule: lr * batch_size / lr_batch_size (Goyal et al. 2017); `lr_batch_size` 0: lr unscaled.

    Raises UserError if the result is below `min_lr`, which is not scaled: the rate would rise instead of fall.
    """
    base_lr = optim.lr * batch_size / optim.lr_batch_size if optim.lr_batch_size else optim.lr
    if optim.min_lr > base_lr:
        raise UserError(
            f"--min-lr {optim.min_lr:g} is above the learning rate, {base_lr:g} at --batch-size {batch_size}: lower it "
            "(it is not scaled with the batch)"
        )
    return base_lr


def lr_at(optim: Optim, base_lr: float, step: int, steps_per_epoch: int) -> float:
    """The learning rate of one step (counted from 0 over the whole run).

    Warm-up: W steps on a line whose first point is warmup_start * base_lr and whose last, step W - 1, is base_lr (the
    code of SwAV, DINO and Fast-MoCo). Then cosine, min + 1/2 (base_lr - min) (1 + cos(pi t)), where t is the share of
    the steps after warm-up that are done (`schedule="step"`) or that share in whole epochs (`"epoch"`, SimSiam's and
    MoCo v2's code); or base_lr to the end (`"constant"`).
    """
    warmup_steps = round(optim.warmup_epochs * steps_per_epoch)
    if step < warmup_steps:
        share = step / (warmup_steps - 1) if warmup_steps > 1 else 1.0
        return base_lr * (optim.warmup_start + (1 - optim.warmup_start) * share)
    if optim.schedule == "constant":
        return base_lr
    if optim.schedule == "epoch":
        done = max(0.0, step // steps_per_epoch - optim.warmup_epochs) / (optim.epochs - optim.warmup_epochs)
    else:
        done = (step - warmup_steps) / (optim.epochs * steps_per_epoch - warmup_steps)
    return _cosine(base_lr, optim.min_lr, done)


def weight_decay_at(optim: Optim, step: int, steps_per_epoch: int) -> float:
    """The weight decay of one step: from `weight_decay` to `weight_decay_end` on a cosine over all steps (DINO's code).

    The cosine has no warm-up and changes at every step, whatever the learning rate's schedule is.
    """
    if optim.weight_decay_end is None:
        return optim.weight_decay
    return _cosine(optim.weight_decay, optim.weight_decay_end, step / (optim.epochs * steps_per_epoch))


def _cosine(start: float, end: float, share: float) -> float:
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * share))


def make_optimizer(method: Method, optim: Optim, base_lr: float) -> torch.optim.Optimizer:
    """The optimiser over the method's parameter groups, each split by what decays and what LARS adapts.

    Groups keep their `fixed_lr` mark and get `decay: bool`: `set_weight_decay` changes groups with decay only.

    SGD, Adam and AdamW are torch's, one fused kernel per group. Adam adds the decay to the gradient, AdamW subtracts it
    from the weights (Loshchilov and Hutter 2019); both use torch's betas, .9 and .999.

    LARS is timm's: the gradient with the decay in it is multiplied by eta ||w|| / (||g|| + decay ||w|| + 1e-8), or by 1
    if either norm is 0, before it enters the momentum buffer; the learning rate is applied after the buffer. That is
    apex's LARC without clipping (SwAV). MoCo v3, DINO and SSLight also multiply before the buffer, but divide by
    ||g + decay w||: at their decay of 1e-6 the two differ by less than 2e-6 ||w|| / ||g||. Fast-MoCo's LARS multiplies
    after the buffer; its pre-training uses SGD. timm adapts groups that decay, and others if marked `always_adapt`.
    Here every group carries that mark: true for all parameters but those that `no_decay` names as <= 1-D. Depth-wise
    weights are adapted even where they do not decay (SSLight). timm's LARS is not fused: with fp16 its steps wait for
    the device, as torch's loss scaling then asks on the host whether the gradients are finite.
    """
    groups = _split(_groups(method), optim)
    if optim.optimizer == "sgd":
        sgd = torch.optim.SGD(groups, base_lr, optim.momentum, weight_decay=optim.weight_decay, fused=True)
        if optim.momentum:
            # Fused SGD fails where one buffer exists and another does not, as when a method drops the gradients of its
            # last layer in the first epoch. From zero the first step is the same: momentum * 0 + gradient.
            for p in (p for group in sgd.param_groups for p in group["params"]):
                sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return sgd
    if optim.optimizer == "lars":
        from timm.optim.lars import Lars  # here, as timm is slow to import

        eta, decay = optim.trust_coefficient, optim.weight_decay
        return Lars(groups, lr=base_lr, momentum=optim.momentum, weight_decay=decay, trust_coeff=eta)
    adam = torch.optim.AdamW if optim.optimizer == "adamw" else torch.optim.Adam
    return adam(groups, lr=base_lr, weight_decay=optim.weight_decay, fused=True)


def _groups(method: Method) -> list[dict[str, Any]]:
    """The method's groups without parameters that are not trained."""
    groups = [g | {"params": [p for p in g["params"] if p.requires_grad]} for g in method.param_groups()]
    covered = sorted(id(p) for g in groups for p in g["params"])
    if covered != sorted(id(p) for p in method.parameters() if p.requires_grad):
        raise ValueError("param_groups() of the method must hold every trainable parameter exactly once")
    return groups


def _split(groups: list[dict[str, Any]], optim: Optim) -> list[dict[str, Any]]:
    """One group for each (decays, is adapted) that occurs in a group; no group is empty."""
    parts = []
    for group in groups:
        classes: dict[tuple[bool, bool], list[Tensor]] = {}
        for p in group["params"]:
            flat = optim.no_decay != "none" and p.ndim <= 1
            decay = not flat and not (optim.no_decay == "1d+depthwise" and _depthwise(p))
            # Only LARS treats depth-wise weights unlike norms and biases: elsewhere one group, one kernel.
            adapt = optim.optimizer == "lars" and not flat
            classes.setdefault((decay, adapt), []).append(p)
        for (decay, adapt), params in classes.items():
            part = group | {"params": params, "decay": decay, "weight_decay": optim.weight_decay if decay else 0.0}
            parts.append(part | ({"always_adapt": adapt} if optim.optimizer == "lars" else {}))
    return parts


def _depthwise(p: Tensor) -> bool:
    """True for the weight [D, 1, k, k] of a depth-wise convolution, told by its shape (SSLight's code)."""
    return p.ndim == 4 and p.shape[1] == 1


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every group that is not marked `fixed_lr`; those stay at the base rate, without warm-up."""
    for group in optimizer.param_groups:
        if not group["fixed_lr"]:
            group["lr"] = lr


def set_weight_decay(optimizer: torch.optim.Optimizer, weight_decay: float) -> None:
    """Set the weight decay of every group that has any."""
    for group in optimizer.param_groups:
        if group["decay"]:
            group["weight_decay"] = weight_decay


@torch.no_grad()
def clip_each_norm(parameters: Iterable[Tensor], limit: float) -> None:
    """Shorten each parameter's gradient g that is longer than `limit`: g <- g limit / (|g| + 1e-6) (DINO's code)."""
    grads = [p.grad for p in parameters if p.grad is not None]
    factors = torch._foreach_add(torch._foreach_norm(grads), 1e-6)
    torch._foreach_reciprocal_(factors)
    torch._foreach_mul_(factors, limit)
    torch._foreach_clamp_max_(factors, 1.0)
    torch._foreach_mul_(grads, factors)
