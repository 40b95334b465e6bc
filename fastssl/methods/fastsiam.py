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
from typing import Literal

from torch import Tensor

from fastssl.losses.guided import guide_mean, spread
from fastssl.losses.ops import feature_std, mean_of_others, negative_cosine, own, pair_loss
from fastssl.losses.patches import Features, predictions
from fastssl.methods import simsiam
from loaders import UserError


@dataclass(kw_only=True)
class Config(simsiam.Config):
    """SimSiam's heads (section 3.2 of FastSiam) and the number of views."""

    num_views: int = 4
    """K: views per image, of which K - 1 make the target of each (section 4.1: 3 targets)."""
    guided_views: Literal[2, 4] = 2
    """The partner's K views are those that it is trained with: 2 (both roles), the only form here."""

    @property
    def num_target_views(self) -> int:
        """Views per image that make targets."""
        return self.num_views

    def validate(self) -> None:
        """Raise UserError for values that make no sense."""
        if self.num_views < 2:
            raise UserError(
                f"--num-views {self.num_views}: a view needs at least one other as its target, use 2 or more"
            )
        super().validate()
        if self.guided_views != 2:
            raise UserError(f"--guided-views {self.guided_views}: fastsiam's views serve in both roles, leave it at 2")
        if self.target_view == "same":
            raise UserError("--target-view same: the target of fastsiam is the mean of the other views")


class Method(simsiam.Method):
    """SimSiam's networks under FastSiam's loss."""

    def loss(self, online: list[Features], h_TBD: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        p_MBD, z_KBD, owner_M = predictions(self.projector, self.predictor, online, self.config)
        z_KBD = self.targets(z_KBD, h_TBD)
        t_KBD = mean_of_others(z_KBD)
        w = own(owner_M, len(t_KBD))
        if self.config.guided != "off":
            w = spread(guide_mean(z_KBD, self.config), owner_M)
        loss = pair_loss(negative_cosine, p_MBD, t_KBD, w)
        return loss, {"feature_std": feature_std(z_KBD)}
