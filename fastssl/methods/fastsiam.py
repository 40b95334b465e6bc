"""FastSiam: SimSiam whose target is the mean of the K - 1 other views.

Pototzky et al., "FastSiam: Resource-Efficient Self-supervised Learning on a Single GPU", GCPR 2022; eq. 4-5.
L = 1/K sum_i D(p_i, sg[mean_{j != i} z_j]). The mean is taken over raw projector outputs; there is no momentum network.
With K = 2 this is SimSiam.

Legend: B images, K views, D projection channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastssl.methods import simsiam as base
from fastssl.nn import encode
from fastssl.ops import feature_std, mean_of_others, negative_cosine
from loaders import Batch, UserError, ViewSpec
from loaders.views import RECIPES


@dataclass(kw_only=True)
class Config(base.Config):
    """SimSiam's heads (section 3.2 of FastSiam) and the number of views."""

    num_views: int = 4
    """K: views per image, of which K - 1 make the target of each (section 4.1: 3 targets)."""

    def validate(self) -> None:
        """Raise UserError for values that make no sense."""
        if self.num_views < 2:
            raise UserError(
                f"--num-views {self.num_views}: a view needs at least one other as its target, use 2 or more"
            )


def views(config: Config, size: int, recipe: str) -> ViewSpec:
    """K views under SimSiam's augmentation (section 4.1)."""
    return RECIPES[recipe](config.num_views, size)


class Method(base.Method):
    """SimSiam's networks under FastSiam's loss."""

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        z_KBD = encode(self.backbone, self.projector, batch.views)
        p_KBD = torch.stack([self.predictor(z) for z in z_KBD])
        t_KBD = mean_of_others(z_KBD.detach())
        loss = negative_cosine(p_KBD, t_KBD).mean()
        return loss, {"feature_std": feature_std(z_KBD)}
