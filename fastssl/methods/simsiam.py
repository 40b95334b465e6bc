"""SimSiam: two views predict each other, the target side without gradient.

Chen and He, "Exploring Simple Siamese Representation Learning", CVPR 2021; eq. 1-4 and section 3.
L = 1/2 D(p_1, sg[z_2]) + 1/2 D(p_2, sg[z_1]), z = g(f(x)), p = h(z), D = negative cosine.

BatchNorm groups: each view by itself.

Legend: B images, T target views, M predictions per image, D projection channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastssl.losses.ops import feature_std, negative_cosine, pair_loss
from fastssl.losses.pairs import PairConfig, pair_weights
from fastssl.losses.patches import Features, online_features, predictions
from fastssl.methods import base
from fastssl.networks.encode import each_view, encode
from fastssl.networks.heads import head_groups, make_heads
from loaders import Batch


@dataclass(kw_only=True)
class Config(PairConfig, base.MethodOptions):
    """Heads of SimSiam (section 3; on CIFAR, appendix D, two layers of 2048 project)."""

    fix_pred_lr: bool = True
    """Keep the predictor's learning rate at its initial value (section 4.2; `--fix-pred-lr` of the official code)."""


class Method(base.Method):
    """f, g, h and the loss."""

    def __init__(self, backbone: nn.Module, width: int, config: Config):
        super().__init__(backbone, config.dim)
        self.config = config
        self.projector, self.predictor = make_heads(width, config)

    @property
    def separable(self) -> bool:
        """Whether the loss is a mean over images that see each other in BatchNorm only."""
        return self.config.guided == "off" and self.config.patches != "montage"

    def features(self, batch: Batch) -> tuple[list[Features], Tensor | None]:
        """f of what predicts; and f of the whole views, if predictions are made from parts of them."""
        online, h_TBD = online_features(self.backbone, batch, self.config), None
        if self.config.patches != "off":
            with torch.no_grad():
                h_TBD = encode(self.backbone, self.config.target_views(batch.views))
        return online, h_TBD

    def loss(self, online: list[Features], h_TBD: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        p_MBD, z_TBD, owner_M = predictions(self.projector, self.predictor, online, self.config)
        z_TBD = self.targets(z_TBD, h_TBD)
        loss = pair_loss(negative_cosine, p_MBD, z_TBD, pair_weights(owner_M, z_TBD, self.config))
        return loss, {"feature_std": feature_std(z_TBD)}

    @torch.no_grad()
    def targets(self, z_TBD: Tensor | None, h_TBD: Tensor | None) -> Tensor:
        """sg[z]: those of the predictions, or of the whole views (Fast-MoCo section 4.4)."""
        return each_view(self.projector, h_TBD) if z_TBD is None else z_TBD.detach()

    def param_groups(self) -> list[dict]:
        return head_groups(self)
