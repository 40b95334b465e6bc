"""Activation checkpointing: blocks of a backbone keep only their input for the backward pass, which computes the rest
again (Chen et al. 2016). Less memory for one more forward pass, and the same numbers: losses, gradients,
running statistics and what stochastic depth drops.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck

from fastssl.networks.batch_norm import batch_norm_groups, group_batch_norm, groups_of, need_batch_norm_groups
from loaders.errors import UserError

_TORCHVISION = (BasicBlock, Bottleneck, InvertedResidual)
_TIMM = ("drop_path", "drop_path1")  # timm's residual blocks have one of these, whether they drop anything or not


def checkpoint_activations(net: nn.Module, name: str) -> None:
    """Let the residual blocks of `net` (backbone `name`), in place, compute their activations again when they are
    needed for gradients. Nothing else changes: not the names in the state dict, nor passes in eval mode or without
    gradients.

    Raises UserError if less than a third of the weights are in such blocks.
    """
    blocks = list(_blocks(net))
    if 3 * sum(_size(block) for block in blocks) < _size(net):
        raise UserError(
            f"--activation-checkpointing: {name} is not made of blocks that can be recomputed, leave it out; it works "
            "with resnet*, mobilenet_v2, vit-* and the models of timm that are made of residual blocks"
        )
    need_batch_norm_groups(net, "--activation-checkpointing")
    for block in blocks:
        group_batch_norm(block)
        block.__class__ = _checkpointed(type(block))  # type: ignore[arg-type]  # classes are hashable


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _blocks(net: nn.Module) -> Iterator[nn.Module]:
    """The outermost residual blocks."""
    for child in net.children():
        if isinstance(child, _TORCHVISION) or any(hasattr(child, name) for name in _TIMM):
            yield child
        else:
            yield from _blocks(child)


@functools.cache
def _checkpointed(block: type[nn.Module]) -> type[nn.Module]:
    """The class `block` with activations computed twice. A subclass, since names in state dicts stay and copies of a
    module work, which would call the original's `forward` if that were replaced."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return block.forward(self, *args, **kwargs)
        # A compiler recomputes values only, never what a pass leaves behind.
        options: dict[str, Any] = {}
        if not torch.compiler.is_compiling():
            options["context_fn"] = functools.partial(_contexts, self)
        return checkpoint(functools.partial(block.forward, self), *args, use_reentrant=False, **options, **kwargs)

    return type(block.__name__, (block,), {"forward": forward, "__module__": block.__module__})


def _contexts(block: nn.Module) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """What the first pass and the second one, later in the backward pass, run in: the second one has the BatchNorm
    groups that the first one had, which are set for each pass, and leaves running statistics alone."""
    groups = groups_of(block)
    running = "copy" if groups.running == "update" else groups.running
    return contextlib.nullcontext(), batch_norm_groups(block, **groups._replace(running=running)._asdict())
