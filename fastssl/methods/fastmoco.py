"""Fast-MoCo: MoCo v3 whose queries are combinations of 2 x 2 tiles.

Ci et al., "Fast-MoCo: Boost Momentum-based Contrastive Learning with Combinatorial Patches", ECCV 2022; section 3.2.
L = mean over the 2 C(n^2, m) pairs of CE(q_c, k), CE over q.k / T of the batch's keys: of every view, all combinations
c of m tiles against the whole other view. With n = m = 1 and the sum of both directions this is MoCo v3.

BatchNorm groups: all tiles of a view in the backbone, all its combinations in the heads.
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
from fastssl.losses.patches import Variant
from fastssl.methods import base
from fastssl.networks.encode import each_view, encode
from fastssl.networks.heads import Bias, OutputNorm, head_groups, make_heads
from fastssl.networks.momentum import Momentum, Schedule, ema_update, momentum_copy
from fastssl.progress import Progress
from loaders import Batch
from loaders.checks import above_zero


@dataclass(kw_only=True)
class Config(PairConfig, Momentum, base.MethodOptions):
    """Heads of Fast-MoCo's code: SimSiam's, but with biases and a full BatchNorm on the projector's output."""

    dim: int = 2048
    """Output of projector and predictor, channels."""
    projector_layers: int = 3
    """Linear layers of the projector."""
    projector_hidden: int | None = 2048
    """Hidden layers of the projector, channels, for every backbone. None: as wide as the backbone's features."""
    projector_bias: Bias = "all"
    """Which Linear layers of the projector have biases."""
    projector_norm: OutputNorm = "affine"
    """BatchNorm on the projector's output: none, fixed (no scale and shift), affine."""
    predictor_hidden: int = 512
    """Hidden layer of the predictor, channels."""
    predictor_bias: Bias = "all"
    """Which Linear layers of the predictor have biases."""
    fix_pred_lr: bool = True
    """Keep the predictor's learning rate at its initial value, without warm-up (Fast-MoCo's code, not its paper)."""
    ema_schedule: Schedule = "constant"
    """constant, or cosine: rising to 1 over the run."""
    sum_directions: bool = False
    """2 T times the sum over the two directions (MoCo v3's code). Off: the mean over all terms (Fast-MoCo's)."""
    patches: Variant = "divide-encode-combine"
    """What predicts; see `Patches`."""
    temperature: float = 1.0
    """T: similarities are divided by it."""

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
