"""ViTs as DINO's code has them, where timm's differ. Apart, since importing timm takes a second.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021, and the code that SSLight shares.

Legend: B images, H x W patches of an image, D features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


class DinoViT(VisionTransformer):
    """timm's ViT whose position embeddings are resized to other image sizes without antialiasing.

    The grid is resized by the factor (H + 0.1) / (its own height), not H / height: the 0.1 guards the code's rounding,
    and moves where the cubic kernel reads.
    """

    cls_token: nn.Parameter
    pos_embed: nn.Parameter

    def _pos_embed(self, x: Tensor) -> Tensor:
        """[B, H, W, D] patches to [B, 1 + H W, D] tokens, class token first, with their positions."""
        height, width = x.shape[1:3]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(1, 2)], 1)
        return self.pos_drop(x + resized_positions(self.pos_embed, self.patch_embed.grid_size, (height, width)))


def resized_positions(positions_1ND: Tensor, grid: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Position embeddings of a class token and of a `grid` of patches for a grid of `new` rows and columns."""
    if grid == new:
        return positions_1ND
    of_class, of_patches = positions_1ND[:, :1], positions_1ND[:, 1:]
    image_1DHW = of_patches.float().unflatten(1, grid).permute(0, 3, 1, 2)
    factors = [(to + 0.1) / of for of, to in zip(grid, new, strict=True)]
    image_1DHW = F.interpolate(image_1DHW, scale_factor=factors, mode="bicubic")
    return torch.cat([of_class, image_1DHW.flatten(2).mT.to(of_class.dtype)], 1)


def like_dino(net: nn.Module) -> DinoViT:
    """Make timm's ViT a `DinoViT`; the class token starts from a truncated normal of std 0.02 (timm: normal, 1e-6)."""
    net.__class__ = DinoViT
    assert isinstance(net, DinoViT)
    nn.init.trunc_normal_(net.cls_token, std=0.02)
    return net
