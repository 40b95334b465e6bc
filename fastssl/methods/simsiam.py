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

from fastssl.nn import encode, head_groups, make_heads
from fastssl.ops import feature_std, negative_cosine, pair_loss
from fastssl.pairs import PairConfig, pair_views, pair_weights
from fastssl.patches import predictions
from loaders import Batch


@dataclass(kw_only=True)
class Config(PairConfig):
    """Heads of SimSiam (section 3; on CIFAR, appendix D, two layers of 2048 project)."""

    fix_pred_lr: bool = True
    """Keep the predictor's learning rate at its initial value (section 4.2; `--fix-pred-lr` of the official code)."""


views = pair_views


class Method(nn.Module):
    """f, g, h and the loss."""

    def __init__(self, backbone: nn.Module, width: int, config: Config):
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.projector, self.predictor = make_heads(width, config)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        online = predictions(self.backbone, self.projector, self.predictor, batch, self.config)
        z_TBD = self.targets(batch) if online.z_TBD is None else online.z_TBD.detach()
        loss = pair_loss(negative_cosine, online.p_MBD, z_TBD, pair_weights(online, z_TBD, self.config))
        return loss, {"feature_std": feature_std(z_TBD)}

    @torch.no_grad()
    def targets(self, batch: Batch) -> Tensor:
        """z_TBD of whole views, for predictions that were made from parts of them (Fast-MoCo section 4.4)."""
        return encode(self.backbone, self.projector, self.config.target_views(batch.views))

    def param_groups(self) -> list[dict]:
        return head_groups(self)
