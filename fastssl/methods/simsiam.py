"""SimSiam: two views predict each other, the target side without gradient.

Chen and He, "Exploring Simple Siamese Representation Learning", CVPR 2021; eq. 1-4 and section 3.
L = 1/2 D(p_1, sg[z_2]) + 1/2 D(p_2, sg[z_1]), z = g(f(x)), p = h(z), D = negative cosine.

Legend: B images, K = 2 views, D projection channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastssl.nn import encode, simsiam_predictor, simsiam_projector
from fastssl.ops import feature_std, negative_cosine
from loaders import Batch, ViewSpec
from loaders.views import RECIPES


@dataclass(kw_only=True)
class Config:
    """Heads of SimSiam (section 3; CIFAR: appendix D)."""

    dim: int = 2048
    """Projector output d, channels."""
    hidden: int = 512
    """Predictor bottleneck, channels (d/4)."""
    projector_layers: int = 3
    """Layers of the projection MLP: 3 for ImageNet, 2 for CIFAR."""
    projector_affine: bool = False
    """Scale and shift in the projector's last BatchNorm: off in the official code, on in lightly's CIFAR heads."""
    fix_pred_lr: bool = True
    """Keep the predictor's learning rate at its initial value (section 4.2; `--fix-pred-lr` of the official code)."""


def views(config: Config, size: int, recipe: str) -> ViewSpec:
    """Two views under MoCo v2's augmentation (appendix A); without blur for CIFAR (appendix D)."""
    del config
    return RECIPES[recipe](2, size)


class Method(nn.Module):
    """f, g, h and the loss. Each view has its own BatchNorm statistics."""

    def __init__(self, backbone: nn.Module, width: int, config: Config):
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.projector = simsiam_projector(
            width, config.dim, layers=config.projector_layers, affine=config.projector_affine
        )
        self.predictor = simsiam_predictor(config.dim, config.hidden)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        z_KBD = encode(self.backbone, self.projector, batch.views)
        p_KBD = torch.stack([self.predictor(z) for z in z_KBD])
        t_KBD = z_KBD.detach().flip(0)
        loss = negative_cosine(p_KBD, t_KBD).mean()
        return loss, {"feature_std": feature_std(z_KBD)}

    def param_groups(self) -> list[dict]:
        return [
            {"params": [*self.backbone.parameters(), *self.projector.parameters()], "fixed_lr": False},
            {"params": list(self.predictor.parameters()), "fixed_lr": self.config.fix_pred_lr},
        ]
