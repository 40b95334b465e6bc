"""Momentum targets: a copy of the network that follows it slowly and never sees a gradient."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastssl.progress import Progress
from loaders.checks import Options, share

Schedule = Literal["constant", "cosine"]


@dataclass(kw_only=True)
class Momentum(Options):
    """Options of the momentum target."""

    ema: float = 0.99
    """Momentum m of the target: target <- m target + (1 - m) network."""
    ema_schedule: Schedule = "constant"
    """constant, or rising to 1 over the run: m_k = 1 - (1 - m)(cos(pi k / K) + 1) / 2 (BYOL section 3.3)."""
    target_init: Literal["copy", "independent"] = "copy"
    """Where the target begins: copy of the network (all papers), or a draw of its own (Fast-MoCo's code)."""

    def validate(self) -> None:
        """Raise UserError for values that make no sense."""
        super().validate()
        share(self, "ema")

    def ema_at(self, progress: Progress) -> float:
        """m of a step."""
        if self.ema_schedule == "constant":
            return self.ema
        return 1 - (1 - self.ema) * (math.cos(math.pi * progress.share) + 1) / 2


@torch.no_grad()
def momentum_copy(module: nn.Module, init: str = "copy") -> nn.Module:
    """A copy without gradients; in train mode it keeps running BatchNorm statistics of its own.

    Stochastic depth is switched off in it (DINO's teacher). `init="independent"` shuffles the entries of every weight:
    another draw of the same initialisation, whichever that is, since its entries are independent and alike.
    """
    made = copy.deepcopy(module).requires_grad_(False)
    for part in made.modules():
        if hasattr(part, "drop_prob"):  # timm's and torchvision's layers of stochastic depth have it
            setattr(part, "drop_prob", 0.0)  # noqa: B010 (Module declares tensors and modules only)
    if init == "independent":
        for p in made.parameters():
            p.copy_(p.flatten()[torch.randperm(p.numel(), device=p.device)].view_as(p))
    return made


@torch.no_grad()
def ema_update(pairs: Iterable[tuple[nn.Module, nn.Module]], m: float) -> None:
    """target <- m target + (1 - m) network for the parameters of (target, network) pairs; buffers stay each one's own.

    m = 0 copies, m = 1 freezes, both exactly.
    """
    targets: list[Tensor] = []
    networks: list[Tensor] = []
    for target, network in pairs:
        targets += target.parameters()
        networks += network.parameters()
    torch._foreach_lerp_(targets, networks, 1 - m)
