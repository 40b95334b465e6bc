"""Augmentation of a whole batch in one pass, on any device; compiled on a GPU.

The random parameters of an image are packed into one row of numbers, for one transfer. Whatever the drawn order, the
four jitter operations are a subsequence of one fixed sequence:

    blend blend hue blend blend contrast blend blend hue blend blend

in which a blend is x -> clamp(factor x + gray_factor gray(x)): brightness has gray_factor 0, saturation 1 - factor.
That sequence runs for all images, with parameters that change nothing where an image skips a step. So contrast, whose
mean needs a pass over the whole image, appears once instead of at each of the four positions.

Compiled for CUDA, a SimSiam view is 6 kernels (CIFAR's, without blur, 2) that move 35 bytes per pixel and channel, as
counted in the code that Inductor writes: 5.3 MB per view of 224 px, 1.3 us at 4 TB/s. Tiles are written by the last
of them, for 2 bytes more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch

from loaders.augment.shared import GRAY, IDENTITY, SOLARIZE_FROM, divide, gaussian, hue_mix
from loaders.batch import empty_images
from loaders.draw import BRIGHTNESS, CONTRAST, HUE, SATURATION, Draws
from loaders.views import View, ViewSpec

Planes = Sequence[torch.Tensor]  # red, green, blue [B, S, S], in [0, 1]
Params = Callable[[int], torch.Tensor]  # column of the packed parameters -> its values, to multiply planes with

_FLIP, _GRAY, _SOLARIZE, _CONTRAST = range(4)  # columns of the packed parameters
_HUE_AT = (4, 8)  # 4 columns each: before and after contrast
_BLEND_AT = (12, 20)  # 4 blends of 2 columns each: before and after contrast
_KERNEL_AT = 28  # R + 1 columns: the blur's weights from the centre outwards


def to_tensors(draws: Draws, view: View, device: torch.device | str) -> torch.Tensor:
    """The draws of one view, packed for `augment`: one float32 tensor [B, N] on `device`."""
    return torch.from_numpy(_pack(draws, view)).to(device)


def _pack(draws: Draws, view: View) -> np.ndarray:
    B, R = len(draws.flip_B), view.blur_radius
    rows = np.arange(B)
    factor_B4 = np.where(draws.jitter_B[:, None], draws.factor_B4, IDENTITY)
    rank_B4 = np.argsort(draws.order_B4, axis=1)  # position of each operation
    late_B4 = rank_B4 > rank_B4[:, CONTRAST : CONTRAST + 1]  # runs after contrast

    params_BN = np.zeros((B, _KERNEL_AT + R + 1), dtype=np.float32)
    params_BN[:, _FLIP] = draws.flip_B
    params_BN[:, _GRAY] = draws.gray_B
    params_BN[:, _SOLARIZE] = draws.solarize_B
    params_BN[:, _CONTRAST] = factor_B4[:, CONTRAST]

    hue_B24 = params_BN[:, _HUE_AT[0] : _BLEND_AT[0]].reshape(B, 2, 4)
    hue_B24[:] = hue_mix(np.zeros(1))
    hue_B24[rows, late_B4[:, HUE].astype(int)] = hue_mix(factor_B4[:, HUE])

    blend_B82 = params_BN[:, _BLEND_AT[0] : _KERNEL_AT].reshape(B, 8, 2)
    blend_B82[:, :, 0] = 1
    for op, other in ((BRIGHTNESS, SATURATION), (SATURATION, BRIGHTNESS)):
        slot_B = 4 * late_B4[:, op] + 2 * (rank_B4[:, op] > rank_B4[:, HUE]) + (rank_B4[:, op] > rank_B4[:, other])
        blend_B82[rows, slot_B, 0] = factor_B4[:, op]
        if op == SATURATION:
            blend_B82[rows, slot_B, 1] = 1 - factor_B4[:, op]

    params_BN[:, _KERNEL_AT:] = gaussian(draws.sigma_B, R)
    return params_BN


def augment(
    crops_B3SS: torch.Tensor,
    params_BN: torch.Tensor,
    view: View,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    dtype: torch.dtype = torch.float32,
    n: int = 1,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Normalised views [B, 3, S, S] in `dtype`, channels last, and their n x n tiles, ordered as by `divide`, or None.

    `params_BN` comes from `to_tensors`, on the crops' device.
    """

    def param(column: int) -> torch.Tensor:
        return params_BN[:, column, None, None]

    # Three tensors [B, S, S], not one: then every operation up to the blur reads and writes the same place, and the
    # compiler can keep all of it in registers.
    crops_B3SS = torch.where(param(_FLIP)[:, None] > 0, crops_B3SS.flip(-1), crops_B3SS)
    planes: Planes = [crops_B3SS[:, c].float() * (1 / 255) for c in range(3)]
    if view.jitter_p > 0:
        planes = _blends_and_hue(planes, param, 0)
        factor = param(_CONTRAST)
        mean_gray = _gray(planes).mean((1, 2), keepdim=True)
        planes = [(factor * x + (1 - factor) * mean_gray).clamp(0, 1) for x in planes]
        planes = _blends_and_hue(planes, param, 1)
    if view.gray_p > 0:
        gray = _gray(planes)
        planes = [torch.where(param(_GRAY) > 0, gray, x) for x in planes]
    # From here on channels last in memory: then views and tiles leave one kernel, the last pass of the blur.
    x = torch.stack(tuple(planes), -1).permute(0, 3, 1, 2)
    if view.blur_p > 0:
        weights = [param(_KERNEL_AT + d)[:, None] for d in range(view.blur_radius + 1)]
        x = _blur(_blur(x, weights, dim=2), weights, dim=3)
    if view.solarize_p > 0:
        x = torch.where((param(_SOLARIZE)[:, None] > 0) & (x >= SOLARIZE_FROM), 1 - x, x)
    x = (x - _per_channel(mean, x.device)) * _per_channel([1 / s for s in std], x.device)
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    return x, divide(x, n) if n > 1 else None


def _per_channel(values: Sequence[float], device: torch.device) -> torch.Tensor:
    """Constants per channel [3, 1, 1], computed on the device: `torch.tensor(values)` would wait for a transfer."""
    channel = torch.arange(3, device=device)[:, None, None]
    return torch.where(channel == 0, values[0], torch.where(channel == 1, values[1], values[2]))


def _blends_and_hue(planes: Planes, param: Params, half: int) -> Planes:
    for step in range(4):
        if step == 2:
            planes = _hue(planes, [param(_HUE_AT[half] + i) for i in range(4)])
        column = _BLEND_AT[half] + 2 * step
        gray = param(column + 1) * _gray(planes)
        planes = [(param(column) * x + gray).clamp(0, 1) for x in planes]
    return planes


def _gray(planes: Planes) -> torch.Tensor:
    return GRAY[0] * planes[0] + GRAY[1] * planes[1] + GRAY[2] * planes[2]


def _hue(planes: Planes, mix: Sequence[torch.Tensor]) -> Planes:
    high = torch.maximum(torch.maximum(planes[0], planes[1]), planes[2])
    low = torch.minimum(torch.minimum(planes[0], planes[1]), planes[2])
    base = mix[3] * (high + low)
    turned = [base + mix[0] * planes[i] + mix[1] * planes[i - 2] + mix[2] * planes[i - 1] for i in range(3)]
    return [torch.minimum(torch.maximum(x, low), high) for x in turned]


def _blur(x: torch.Tensor, weights: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """Convolve along `dim` with a symmetric kernel per image; borders reflect, without repeating the edge pixel."""
    R, S = len(weights) - 1, x.shape[dim]
    padded = torch.nn.functional.pad(x, (0, 0, R, R) if dim == 2 else (R, R, 0, 0), mode="reflect")
    blurred = weights[0] * x
    for d in range(1, R + 1):
        blurred = blurred + weights[d] * (padded.narrow(dim, R - d, S) + padded.narrow(dim, R + d, S))
    return blurred


class DeviceAugment:
    """Runs `augment` for all views of a specification; on CUDA compiled, once per distinct view.

    Batches are made `at_once` images at a time: intermediate results take a multiple of the memory of the views.
    Shapes are fixed by the first batch; what is left over, and batches of other sizes (the last of an evaluation), run
    uncompiled.
    """

    def __init__(
        self, spec: ViewSpec, device: torch.device | str, dtype: torch.dtype = torch.float32, at_once: int = 256
    ):
        self.spec, self.device, self.dtype, self.at_once = spec, torch.device(device), dtype, at_once
        self._batch_size: int | None = None
        self._eager: dict[View, Callable[..., tuple[torch.Tensor, torch.Tensor | None]]] = {
            view: functools.partial(augment, view=view, mean=spec.mean, std=spec.std, dtype=dtype, n=spec.divide)
            for view in spec.views
        }
        self._fast = self._eager
        if self.device.type == "cuda":
            # An evaluation's centre crop is only normalised: not worth compiling for every pass over a file.
            self._fast = {
                v: f if v.center is not None else torch.compile(f, fullgraph=True, dynamic=False)
                for v, f in self._eager.items()
            }

    def __call__(
        self, crops: Sequence[torch.Tensor], draws: Sequence[Draws]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
        """K views [B, 3, S_k, S_k] and their tiles (None without), on the device, from K uint8 crops.

        Crops that are on the host should be pinned; with the parameters, which travel in one transfer, they must stay
        as they are until the device has come this far.
        """
        num, packed = len(crops[0]), [_pack(d, view) for d, view in zip(draws, self.spec.views, strict=True)]
        flat = torch.from_numpy(np.concatenate([p.reshape(-1) for p in packed]))
        if self.device.type == "cuda":
            flat = flat.pin_memory().to(self.device, non_blocking=True)
        params = [p.view(num, -1) for p in flat.split([p.size for p in packed])]
        if num <= self.at_once:
            views, tiles = self._some(crops, params)
            return views, tiles or None
        n = self.spec.divide
        views = [empty_images(num, size, self.dtype, self.device) for size in self.spec.sizes]
        tiles = [empty_images(n * n * num, size // n, self.dtype, self.device) for size in self.spec.sizes if n > 1]
        for start in range(0, num, self.at_once):
            here = slice(start, start + self.at_once)
            some_views, some_tiles = self._some([c[here] for c in crops], [p[here] for p in params])
            for all_B3SS, part in zip(views, some_views, strict=True):
                all_B3SS[here] = part
            for all_P3ss, part in zip(tiles, some_tiles, strict=True):
                all_P3ss.unflatten(0, (n * n, num))[:, here] = part.unflatten(0, (n * n, -1))
        return views, tiles or None

    def _some(
        self, crops: Sequence[torch.Tensor], params: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        if self._batch_size is None:
            self._batch_size = len(crops[0])
        functions = self._fast if len(crops[0]) == self._batch_size else self._eager
        made = [
            functions[view](c.to(self.device, non_blocking=True), p)
            for view, c, p in zip(self.spec.views, crops, params, strict=True)
        ]
        views, tiles = zip(*made, strict=True)
        return list(views), [t for t in tiles if t is not None]
