"""SimSiam: two views predict each other, the target side without gradient.

Chen and He, "Exploring Simple Siamese Representation Learning", CVPR 2021; eq. 1-4 and section 3.
L = 1/2 D(p_1, sg[z_2]) + 1/2 D(p_2, sg[z_1]), z = g(f(x)), p = h(z), D = negative cosine.

BatchNorm groups: each view by itself.

Legend: B images, T target views, M predictions per image, D projection channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastssl.losses.ops import feature_std, negative_cosine, pair_loss
from fastssl.losses.pairs import PairConfig
from fastssl.methods import base
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
        self.steps = config.steps(siamese=True)
        self.separable = self.steps.separable

    def features(self, batch: Batch) -> tuple[Any]:
        return (self.steps.encode(self.backbone, batch),)

    def loss(self, h: Any) -> tuple[Tensor, base.Metrics]:
        z = self.steps.project(self.projector, h)
        p_MBD = self.steps.predict(self.predictor, z)
        t_TBD = self.steps.targets(z)
        loss = pair_loss(negative_cosine, p_MBD, t_TBD, self.steps.weights(z, t_TBD))
        return loss, {"feature_std": feature_std(t_TBD)}

    def param_groups(self) -> list[dict[str, Any]]:
        return head_groups(self, self.predictor, self.config.fix_pred_lr)
