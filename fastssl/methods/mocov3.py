"""MoCo v3: each view finds the other one's momentum key among the keys of all images.

Chen, Xie and He, "An Empirical Study of Training Self-Supervised Vision Transformers", ICCV 2021; algorithm 1.
L = 2 T (CE(q_1, k_2) + CE(q_2, k_1)), CE over q.k / T of the batch's keys, q = h(g(f(x))), k from the momentum copy.

BatchNorm groups: each view by itself, in the target too, which is in train mode.

Legend: B images of this process, N of all processes, T target views, M queries per image, D projection channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastssl import processes
from fastssl.losses.ops import feature_std, info_nce, pair_loss
from fastssl.losses.pairs import PairConfig
from fastssl.methods import base
from fastssl.networks.encode import each_view, encode
from fastssl.networks.heads import Bias, OutputNorm, head_groups, make_heads
from fastssl.networks.momentum import Momentum, Schedule, ema_update, momentum_copy
from fastssl.progress import Progress
from loaders import Batch
from loaders.checks import above_zero


@dataclass(kw_only=True)
class Config(PairConfig, Momentum, base.MethodOptions):
    """Heads of MoCo v3's ResNet-50 (its code: two layers each without biases, BatchNorm on the projector's output)."""

    dim: int = 256
    """Output of projector and predictor, channels."""
    projector_layers: int = 2
    """Linear layers of the projector."""
    projector_hidden: int | None = 4096
    """Hidden layer of the projector, channels. None: as wide as the backbone's features."""
    projector_bias: Bias = "none"
    """Which Linear layers of the projector have biases."""
    projector_norm: OutputNorm = "fixed"
    """BatchNorm on the projector's output: none, fixed (no scale and shift), affine."""
    predictor_hidden: int = 4096
    """Hidden layer of the predictor, channels."""
    predictor_bias: Bias = "none"
    """Which Linear layers of the predictor have biases."""
    ema_schedule: Schedule = "cosine"
    """constant, or cosine: rising to 1 over the run."""
    sum_directions: bool = True
    """2 T times the sum over the two directions (MoCo v3's code). Off: the mean over all terms (Fast-MoCo's)."""
    temperature: float = 1.0
    """T: similarities are divided by it (1.0 for ResNet-50, 0.2 for ViTs)."""

    def validate(self) -> None:
        """Raise UserError for values that make no sense."""
        super().validate()
        above_zero(self, "temperature")


class Method(base.Method):
    """f, g, q, the momentum copies of f and g, and the loss."""

    def __init__(self, backbone: nn.Module, width: int, config: Config):
        super().__init__(backbone, config.dim)
        self.config = config
        self.projector, self.predictor = make_heads(width, config)
        self.target_backbone = momentum_copy(self.backbone, config.target_init)
        self.target_projector = momentum_copy(self.projector, config.target_init)
        self.steps = config.steps()

    def features(self, batch: Batch) -> tuple[Any, Tensor]:
        with torch.no_grad():
            h_TBD = encode(self.target_backbone, self.steps.target_views(batch))
        return self.steps.encode(self.backbone, batch), h_TBD

    def loss(self, h: Any, h_TBD: Tensor) -> tuple[Tensor, base.Metrics]:
        z = self.steps.project(self.projector, h)
        p_MBD = self.steps.predict(self.predictor, z)
        with torch.no_grad():
            z_TBD = each_view(self.target_projector, h_TBD)
        k_TND = [processes.gather(z_BD) for z_BD in z_TBD]
        own_B = processes.own_rows(z_TBD.shape[1], z_TBD.device)
        cross_entropy = partial(info_nce, temperature=self.config.temperature, positives=own_B)
        loss = pair_loss(cross_entropy, p_MBD, k_TND, self.steps.weights(z, z_TBD))
        if self.config.sum_directions:
            loss = 4 * self.config.temperature * loss
        return loss, {"feature_std": feature_std(z_TBD)}

    def param_groups(self) -> list[dict[str, Any]]:
        return head_groups(self, self.predictor, self.config.fix_pred_lr)

    def before_step(self, progress: Progress) -> None:
        pairs = [(self.target_backbone, self.backbone), (self.target_projector, self.projector)]
        ema_update(pairs, self.config.ema_at(progress))
