"""FastSiam: SimSiam whose target is the mean of the K - 1 other views.

Pototzky et al., "FastSiam: Resource-Efficient Self-supervised Learning on a Single GPU", GCPR 2022; eq. 4-5.
L = 1/K sum_i D(p_i, sg[mean_{j != i} z_j]). The mean is taken over raw projector outputs; there is no momentum network.
With K = 2 this is SimSiam.

With patches (every combination of view i's tiles predicts the mean of the other views) and with guided stop-gradient
(only the view closest to the partner's predicts) it is not in a paper: those two are fastssl's own.

Legend: B images, K views, M predictions per image, D projection channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from fastssl.losses.ops import feature_std, mean_of_others, negative_cosine, pair_loss
from fastssl.losses.pairs import PairConfig
from fastssl.methods import base
from fastssl.networks.heads import head_groups, make_heads
from loaders import Batch
from loaders.checks import at_least, need


@dataclass(kw_only=True)
class Config(PairConfig, base.MethodOptions):
    """SimSiam's heads (section 3.2 of FastSiam) and the number of views."""

    fix_pred_lr: bool = True
    """Keep the predictor's learning rate at its initial value (SimSiam section 4.2)."""
    num_views: int = 4
    """K: views per image, of which K - 1 make the target of each (section 4.1: 3 targets)."""
    guided_views: Literal[2, 4] = 2
    """The partner's K views are those that it is trained with: 2 (both roles), the only form here."""

    @property
    def num_target_views(self) -> int:
        return self.num_views

    def validate(self) -> None:
        at_least(self, 2, "num_views")
        super().validate()
        need(
            self.guided_views == 2,
            f"--guided-views {self.guided_views}: fastsiam's views serve in both roles, leave it at 2",
        )
        need(self.target_view == "other", "--target-view same: the target of fastsiam is the mean of the other views")


class Method(base.Method):
    """f, g, h and the loss."""

    def __init__(self, backbone: nn.Module, width: int, config: Config):
        super().__init__(backbone, config.dim)
        self.config = config
        self.projector, self.predictor = make_heads(width, config)
        self.steps = config.steps(siamese=True, mean_targets=True)
        self.separable = self.steps.separable

    def features(self, batch: Batch) -> tuple[Any]:
        return (self.steps.encode(self.backbone, batch),)

    def loss(self, h: Any) -> tuple[Tensor, base.Metrics]:
        z = self.steps.project(self.projector, h)
        p_MBD = self.steps.predict(self.predictor, z)
        z_KBD = self.steps.targets(z)
        t_KBD = mean_of_others(z_KBD)
        loss = pair_loss(negative_cosine, p_MBD, t_KBD, self.steps.weights(z, z_KBD))
        return loss, {"feature_std": feature_std(z_KBD)}

    def param_groups(self) -> list[dict[str, Any]]:
        return head_groups(self, self.predictor, self.config.fix_pred_lr)
