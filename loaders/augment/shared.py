"""Tiles, and the mathematics of hue and blur: shared by the two forms of augmentation.

Hue needs no HSV. Let V and m be the largest and the smallest channel of a pixel. Turning the hue by the share h of
the circle moves each channel along a trapezoid with corners every 60 degrees. With -6h = 2k + d, k whole and
|d| <= 1, the 2k is a rotation of the channels by k, and what remains is, for channel i (indices modulo 3),

    clamp(x[i+k] - min(1, 1-2d) x[i+k+1] - min(1, 1+2d) x[i+k-1] + (1 - |d|)(V + m), m, V)

Inside each sextant of the colour circle both sides are linear and they agree at the corners, so this is exact; it
has no division and no branch, which is what makes it an order of magnitude faster than the way through HSV.
"""

from __future__ import annotations

import numpy as np
import torch

GRAY = (0.2989, 0.587, 0.114)  # luma weights of ITU-R BT.601, rounded as torchvision rounds them
SOLARIZE_FROM = (128 - 1e-3) / 255  # 128 as in BYOL's recipe; a hair less, so that rounding never excludes 128 itself
IDENTITY = np.array([1, 1, 1, 0], dtype=np.float32)  # factors that change nothing, by operation id


def divide(x_BCHW: torch.Tensor, n: int) -> torch.Tensor:
    """Cut images in n x n tiles: [n*n*B, C, H/n, W/n], channels last, tile-major, tiles in column-major order (n = 2:
    top left, bottom left, top right, bottom right), as Fast-MoCo's code does.

    Raises ValueError if n does not divide the sides.
    """
    height, width = x_BCHW.shape[2:]
    if n < 1 or height % n or width % n:
        raise ValueError(f"images of {height} x {width} px cannot be divided {n} x {n}: sides must be multiples of n")
    return cut(x_BCHW, n).flatten(0, 2).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def cut(x_BCHW: torch.Tensor, n: int) -> torch.Tensor:
    """View of the same pixels by column of tiles, row of tiles and image: [n, n, B, H/n, W/n, C]."""
    rows_cut = x_BCHW.permute(0, 2, 3, 1).unflatten(1, (n, -1))
    return rows_cut.unflatten(3, (n, -1)).permute(3, 1, 0, 2, 4, 5)


def hue_mix(hue_B: np.ndarray) -> np.ndarray:
    """Weights of x[i], x[i+1], x[i+2] and V + m in channel i of the turned hue [B, 4]; see the top of the file."""
    k_B = np.rint(-3.0 * hue_B)
    d_B = -6.0 * hue_B - 2 * k_B
    weights_B3 = np.stack((np.ones_like(d_B), -np.minimum(1, 1 - 2 * d_B), -np.minimum(1, 1 + 2 * d_B)), axis=1)
    turned = (np.arange(3) - k_B[:, None].astype(int)) % 3
    return np.column_stack((np.take_along_axis(weights_B3, turned, axis=1), 1 - np.abs(d_B)))


def radius(sigma_B: np.ndarray, largest: int) -> np.ndarray:
    """Radius of each Gaussian, pixels [B]: beyond 3.5 sigma lies 0.05 % of it."""
    return np.minimum(largest, np.ceil(3.5 * sigma_B)).astype(int)


def gaussian(sigma_B: np.ndarray, largest: int) -> np.ndarray:
    """Weights at distance 0..largest of Gaussians that sum to 1 over both sides [B, largest + 1]; sigma 0: no blur."""
    distance = np.arange(largest + 1)
    sigma_B1 = np.maximum(sigma_B.astype(np.float64), 1e-3)[:, None]  # exp(-1 / 2e-6) is 0 already
    weights_BR = np.exp(-0.5 * (distance / sigma_B1) ** 2) * (distance <= radius(sigma_B, largest)[:, None])
    return weights_BR / (2 * weights_BR.sum(axis=1, keepdims=True) - weights_BR[:, :1])
