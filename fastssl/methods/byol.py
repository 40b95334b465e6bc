"""BYOL: SimSiam whose targets come from a momentum copy of the network.

Grill et al., "Bootstrap Your Own Latent", NeurIPS 2020; eq. 1-2 and sections 3.1, 3.3.
L = d(p_1, sg[t_2]) + d(p_2, sg[t_1]), d(p, t) = 2 - 2 cos(p, t), t from the copies of f and g. That is 4 (1 + L) for
SimSiam's L: learning rates of the two scales do not compare.

BatchNorm groups: each view by itself, in the target too, which is in train mode.

Legend: B images, T target views, M predictions per image, D projection channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastssl.losses.ops import feature_std, negative_cosine, pair_loss
from fastssl.losses.pairs import PairConfig, pair_weights
from fastssl.losses.patches import Features, online_features, predictions
from fastssl.methods import base, simsiam
from fastssl.networks.encode import each_view, encode
from fastssl.networks.heads import OutputNorm, PredictorBias
from fastssl.networks.momentum import Momentum, Schedule, ema_update, momentum_copy
from fastssl.progress import Progress
from loaders import Batch


@dataclass(kw_only=True)
class Config(PairConfig, Momentum, base.MethodOptions):
    """Heads of BYOL (section 3.3: 4096 -> 256 in g and h, with biases, no BatchNorm on outputs)."""

    dim: int = 256
    """Output of projector and predictor, channels."""
    projector_layers: int = 2
    """Linear layers of the projector."""
    projector_hidden: int | None = 4096
    """Hidden layer of the projector, channels. None: as wide as the backbone's features."""
    projector_bias: bool = True
    """Biases in the projector's Linear layers."""
    projector_norm: OutputNorm = "none"
    """BatchNorm on the projector's output: none, fixed (no scale and shift), affine."""
    predictor_hidden: int = 4096
    """Hidden layer of the predictor, channels."""
    predictor_bias: PredictorBias = "all"
    """Which Linear layers of the predictor have biases."""
    ema_schedule: Schedule = "cosine"
    """constant, or cosine: rising to 1 over the run (section 3.3)."""
    sum_directions: bool = True
    """2 - 2 cos summed over the two directions (BYOL). Off: SimSiam's mean of -cos, as guided stop-gradient's code."""

    def validate(self) -> None:
        """Raise UserError for values that make no sense."""
        super().validate()
        self.validate_momentum()


class Method(simsiam.Method):
    """SimSiam's networks, the momentum copies of f and g, and the loss."""

    def __init__(self, backbone: nn.Module, width: int, config: Config):
        super().__init__(backbone, width, config)
        self.target_backbone = momentum_copy(self.backbone, config.target_init)
        self.target_projector = momentum_copy(self.projector, config.target_init)

    def features(self, batch: Batch) -> tuple[list[Features], Tensor]:
        """f of what predicts, and the momentum copy's features of the whole views."""
        with torch.no_grad():
            h_TBD = encode(self.target_backbone, self.config.target_views(batch.views))
        return online_features(self.backbone, batch, self.config), h_TBD

    def loss(self, online: list[Features], h_TBD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        p_MBD, _, owner_M = predictions(self.projector, self.predictor, online, self.config)
        z_TBD = self.targets(h_TBD)
        loss = pair_loss(negative_cosine, p_MBD, z_TBD, pair_weights(owner_M, z_TBD, self.config))
        if self.config.sum_directions:
            loss = 4 * (1 + loss)
        return loss, {"feature_std": feature_std(z_TBD)}

    @torch.no_grad()
    def targets(self, h_TBD: Tensor) -> Tensor:
        """z of the momentum copy."""
        return each_view(self.target_projector, h_TBD)

    def before_step(self, progress: Progress) -> None:
        pairs = [(self.target_backbone, self.backbone), (self.target_projector, self.projector)]
        ema_update(pairs, self.config.ema_at(progress))
