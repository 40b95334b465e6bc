"""BYOL: SimSiam whose targets come from a momentum copy of the network.

Grill et al., "Bootstrap Your Own Latent", NeurIPS 2020; eq. 1-2 and sections 3.1, 3.3.
L = d(p_1, sg[t_2]) + d(p_2, sg[t_1]), d(p, t) = 2 - 2 cos(p, t), t from the copies of f and g. That is 4 (1 + L) for
SimSiam's L: learning rates of the two scales do not compare.

BatchNorm groups: each view by itself, in the target too, which is in train mode.

Legend: B images, T target views, M predictions per image, D projection channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.losses.ops import feature_std, negative_cosine, pair_loss
from fastssl.losses.pairs import PairConfig
from fastssl.methods import base
from fastssl.networks.encode import each_view, encode
from fastssl.networks.heads import Bias, OutputNorm, head_groups, make_heads
from fastssl.networks.momentum import Momentum, Schedule, ema_update, momentum_copy
from fastssl.progress import Progress
from loaders import Batch


@dataclass(kw_only=True)
class Config(PairConfig, Momentum, base.MethodOptions):
    """Heads of BYOL (section 3.3: 4096 -> 256 in g and h; in its code only hidden layers have biases)."""

    dim: int = 256
    """Output of projector and predictor, channels."""
    projector_layers: int = 2
    """Linear layers of the projector."""
    projector_hidden: int | None = 4096
    """Hidden layer of the projector, channels. None: as wide as the backbone's features."""
    projector_bias: Bias = "hidden"
    """Which Linear layers of the projector have biases."""
    projector_norm: OutputNorm = "none"
    """BatchNorm on the projector's output: none, fixed (no scale and shift), affine."""
    predictor_hidden: int = 4096
    """Hidden layer of the predictor, channels."""
    predictor_bias: Bias = "hidden"
    """Which Linear layers of the predictor have biases."""
    ema_schedule: Schedule = "cosine"
    """constant, or cosine: rising to 1 over the run (section 3.3)."""
    sum_directions: bool = True
    """2 - 2 cos summed over the two directions (BYOL). Off: SimSiam's mean of -cos, as guided stop-gradient's code."""


class Method(base.Method):
    """f, g, q, the momentum copies of f and g, and the loss."""

    def __init__(self, backbone: nn.Module, width: int, config: Config):
        super().__init__(backbone, config.dim)
        self.config = config
        self.projector, self.predictor = make_heads(width, config)
        self.target_backbone = momentum_copy(self.backbone, config.target_init)
        self.target_projector = momentum_copy(self.projector, config.target_init)
        self.steps = config.steps()
        self.separable = self.steps.separable

    def features(self, batch: Batch) -> tuple[Any, Tensor]:
        with torch.no_grad():
            h_TBD = encode(self.target_backbone, self.steps.target_views(batch))
        return self.steps.encode(self.backbone, batch), h_TBD

    def loss(self, h: Any, h_TBD: Tensor) -> tuple[Tensor, base.Metrics]:
        z = self.steps.project(self.projector, h)
        p_MBD = self.steps.predict(self.predictor, z)
        with torch.no_grad():
            t_TBD = each_view(self.target_projector, h_TBD)
        loss = pair_loss(negative_cosine, p_MBD, t_TBD, self.steps.weights(z, t_TBD))
        if self.config.sum_directions:
            loss = 4 * (1 + loss)
        return loss, {"feature_std": feature_std(t_TBD)}

    def param_groups(self) -> list[dict[str, Any]]:
        return head_groups(self, self.predictor, self.config.fix_pred_lr)

    def before_step(self, progress: Progress) -> None:
        pairs = [(self.target_backbone, self.backbone), (self.target_projector, self.projector)]
        ema_update(pairs, self.config.ema_at(progress))
