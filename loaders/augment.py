"""uint8 crops and draws -> normalised views, and their tiles for methods that want these.

Two forms of the same function. `augment` works on a whole batch on any device, without data-dependent control flow
or host synchronisation, so that torch.compile fuses it. `augment_rows` works on the CPU image by image, in cache,
and does only what was drawn. Both mean what torchvision.transforms.v2.functional means on float images in [0, 1]:
jitter in drawn order, gray, blur, solarize, flip, normalise. (Flipping first, as done here, gives the same pixels.)

Legend: B images, 3 channels, S x S pixels, n x n tiles of s x s, P = n n B of them, R radius of the blur, N parameters
per image.

Hue needs no HSV. Let V and m be the largest and the smallest channel of a pixel. Turning the hue by the share h of
the circle moves each channel along a trapezoid with corners every 60 degrees. With -6h = 2k + d, k whole and
|d| <= 1, the 2k is a rotation of the channels by k, and what remains is, for channel i (indices modulo 3),

    clamp(x[i+k] - min(1, 1-2d) x[i+k+1] - min(1, 1+2d) x[i+k-1] + (1 - |d|)(V + m), m, V)

Inside each sextant of the colour circle both sides are linear and they agree at the corners, so this is exact; it
has no division and no branch, which is what makes it an order of magnitude faster than the way through HSV.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from loaders.draw import BRIGHTNESS, CONTRAST, HUE, SATURATION, Draws
from loaders.views import View, ViewSpec

GRAY = (0.2989, 0.587, 0.114)  # luma weights of ITU-R BT.601, rounded as torchvision rounds them
SOLARIZE_FROM = (128 - 1e-3) / 255  # 128 as in BYOL's recipe; a hair less, so that rounding never excludes 128 itself

_IDENTITY = np.float32([1, 1, 1, 0])  # factors that change nothing, by operation id


# --- Tiles ------------------------------------------------------------------------------------------------------------


def divide(x_BCHW: torch.Tensor, n: int) -> torch.Tensor:
    """Cut images in n x n tiles: [n*n*B, C, H/n, W/n], channels last, tile-major, tiles in column-major order (n = 2:
    top left, bottom left, top right, bottom right), as Fast-MoCo's code does.

    Raises ValueError if n does not divide the sides.
    """
    height, width = x_BCHW.shape[2:]
    if n < 1 or height % n or width % n:
        raise ValueError(f"images of {height} x {width} px cannot be divided {n} x {n}: sides must be multiples of n")
    return _cut(x_BCHW, n).flatten(0, 2).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def _cut(x_BCHW: torch.Tensor, n: int) -> torch.Tensor:
    """The same pixels, not copied, by column of tiles, row of tiles and image: [n, n, B, H/n, W/n, C]."""
    rows_cut = x_BCHW.permute(0, 2, 3, 1).unflatten(1, (n, -1))
    return rows_cut.unflatten(3, (n, -1)).permute(3, 1, 0, 2, 4, 5)


# --- Parameters, packed for one transfer ------------------------------------------------------------------------------
#
# Whatever the drawn order, the four operations are a subsequence of one fixed sequence:
#     blend blend hue blend blend contrast blend blend hue blend blend
# in which a blend is x -> clamp(factor x + gray_factor gray(x)): brightness has gray_factor 0, saturation 1 - factor.
# The batch form runs that sequence for all images, with parameters that change nothing where an image skips a step.
# So contrast, whose mean needs a pass over the whole image, appears once instead of at each of the four positions.

_FLIP, _GRAY, _SOLARIZE, _CONTRAST = range(4)  # columns of the packed parameters
_HUE_AT = (4, 8)  # 4 columns each: before and after contrast
_BLEND_AT = (12, 20)  # 4 blends of 2 columns each: before and after contrast
_KERNEL_AT = 28  # R + 1 columns: the blur's weights from the centre outwards


def to_tensors(draws: Draws, view: View, device: torch.device | str) -> torch.Tensor:
    """Everything `augment` needs to know of one view's draws, as one float32 tensor [B, N] on `device`."""
    return torch.from_numpy(_pack(draws, view)).to(device)


def _pack(draws: Draws, view: View) -> np.ndarray:
    B, R = len(draws.flip_B), view.blur_radius
    rows = np.arange(B)
    factor_B4 = np.where(draws.jitter_B[:, None], draws.factor_B4, _IDENTITY)
    rank_B4 = np.argsort(draws.order_B4, axis=1)  # position of each operation
    late_B4 = rank_B4 > rank_B4[:, CONTRAST : CONTRAST + 1]  # runs after contrast

    params_BN = np.zeros((B, _KERNEL_AT + R + 1), dtype=np.float32)
    params_BN[:, _FLIP] = draws.flip_B
    params_BN[:, _GRAY] = draws.gray_B
    params_BN[:, _SOLARIZE] = draws.solarize_B
    params_BN[:, _CONTRAST] = factor_B4[:, CONTRAST]

    hue_B24 = params_BN[:, _HUE_AT[0] : _BLEND_AT[0]].reshape(B, 2, 4)
    hue_B24[:] = _hue_mix(np.zeros(1))
    hue_B24[rows, late_B4[:, HUE].astype(int)] = _hue_mix(factor_B4[:, HUE])

    blend_B82 = params_BN[:, _BLEND_AT[0] : _KERNEL_AT].reshape(B, 8, 2)
    blend_B82[:, :, 0] = 1
    for op, other in ((BRIGHTNESS, SATURATION), (SATURATION, BRIGHTNESS)):
        slot_B = 4 * late_B4[:, op] + 2 * (rank_B4[:, op] > rank_B4[:, HUE]) + (rank_B4[:, op] > rank_B4[:, other])
        blend_B82[rows, slot_B, 0] = factor_B4[:, op]
        if op == SATURATION:
            blend_B82[rows, slot_B, 1] = 1 - factor_B4[:, op]

    params_BN[:, _KERNEL_AT:] = _gaussian(draws.sigma_B, R)
    return params_BN


def _hue_mix(hue_B: np.ndarray) -> np.ndarray:
    """Weights of x[i], x[i+1], x[i+2] and V + m in channel i of the turned hue [B, 4]; see the top of the file."""
    k_B = np.rint(-3.0 * hue_B)
    d_B = -6.0 * hue_B - 2 * k_B
    weights_B3 = np.stack((np.ones_like(d_B), -np.minimum(1, 1 - 2 * d_B), -np.minimum(1, 1 + 2 * d_B)), axis=1)
    turned = (np.arange(3) - k_B[:, None].astype(int)) % 3
    return np.column_stack((np.take_along_axis(weights_B3, turned, axis=1), 1 - np.abs(d_B)))


def _radius(sigma_B: np.ndarray, largest: int) -> np.ndarray:
    """Where each Gaussian ends, pixels [B]: beyond 3.5 sigma lies 0.05 % of it."""
    return np.minimum(largest, np.ceil(3.5 * sigma_B)).astype(int)


def _gaussian(sigma_B: np.ndarray, largest: int) -> np.ndarray:
    """Weights at distance 0..largest of Gaussians that sum to 1 over both sides [B, largest + 1]; sigma 0: no blur."""
    distance = np.arange(largest + 1)
    sigma_B1 = np.maximum(sigma_B.astype(np.float64), 1e-3)[:, None]  # exp(-1 / 2e-6) is 0 already
    weights_BR = np.exp(-0.5 * (distance / sigma_B1) ** 2) * (distance <= _radius(sigma_B, largest)[:, None])
    return weights_BR / (2 * weights_BR.sum(axis=1, keepdims=True) - weights_BR[:, :1])


# --- The batch form ---------------------------------------------------------------------------------------------------
#
# Compiled for CUDA, a SimSiam view is 6 kernels (CIFAR's, without blur, 2) that move 35 bytes per pixel and channel, as
# counted in the code that Inductor writes: 5.3 MB per view of 224 px, 1.3 us at 4 TB/s. Tiles are written by the last
# of them, for 2 bytes more.


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
    """Normalised views [B, 3, S, S] in `dtype`, channels last, and their n x n tiles as from `divide` (n = 1: None).

    `params_BN` comes from `to_tensors`, on the crops' device.
    """

    def param(column: int) -> torch.Tensor:
        return params_BN[:, column, None, None]

    # Three tensors [B, S, S], not one: then every operation up to the blur reads and writes the same place, and the
    # compiler can keep all of it in registers.
    crops_B3SS = torch.where(param(_FLIP)[:, None] > 0, crops_B3SS.flip(-1), crops_B3SS)
    planes = [crops_B3SS[:, c].float() * (1 / 255) for c in range(3)]
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
    x = torch.stack(planes, -1).permute(0, 3, 1, 2)
    if view.blur_p > 0:
        weights = [param(_KERNEL_AT + d)[:, None] for d in range(view.blur_radius + 1)]
        x = _blur(_blur(x, weights, dim=2), weights, dim=3)
    if view.solarize_p > 0:
        x = torch.where((param(_SOLARIZE)[:, None] > 0) & (x >= SOLARIZE_FROM), 1 - x, x)
    x = (x - _per_channel(mean, x.device)) * _per_channel([1 / s for s in std], x.device)
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    return x, divide(x, n) if n > 1 else None


def _per_channel(values: Sequence[float], device: torch.device) -> torch.Tensor:
    """[3, 1, 1], computed on the device: `torch.tensor(values, device=device)` would wait for a transfer."""
    channel = torch.arange(3, device=device)[:, None, None]
    return torch.where(channel == 0, values[0], torch.where(channel == 1, values[1], values[2]))


Planes = Sequence[torch.Tensor]  # red, green, blue [B, S, S], in [0, 1]


def _blends_and_hue(planes: Planes, param: Callable[[int], torch.Tensor], half: int) -> Planes:
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
    """`augment` for all views of a specification; on CUDA compiled, once per distinct view.

    Batches are made `at_once` images at a time: what lies between crops and views takes a multiple of their memory.
    Shapes are fixed by the first batch; what is left over, and batches of other sizes (the last of an evaluation), run
    uncompiled.
    """

    def __init__(
        self, spec: ViewSpec, device: torch.device | str, dtype: torch.dtype = torch.float32, at_once: int = 256
    ):
        self.spec, self.device, self.dtype, self.at_once = spec, torch.device(device), dtype, at_once
        self._batch_size: int | None = None
        self._eager = {
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
            return views, tiles if self.spec.divide > 1 else None
        n = self.spec.divide
        views = [self._empty(num, size) for size in self.spec.sizes]
        tiles = [self._empty(n * n * num, size // n) for size in self.spec.sizes] if n > 1 else None
        for start in range(0, num, self.at_once):
            here = slice(start, start + self.at_once)
            some_views, some_tiles = self._some([c[here] for c in crops], [p[here] for p in params])
            for all_B3SS, part in zip(views, some_views, strict=True):
                all_B3SS[here] = part
            if tiles is not None:
                for all_P3ss, part in zip(tiles, some_tiles, strict=True):
                    all_P3ss.unflatten(0, (n * n, num))[:, here] = part.unflatten(0, (n * n, -1))
        return views, tiles

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
        return list(views), list(tiles)

    def _empty(self, num: int, size: int) -> torch.Tensor:
        return torch.empty(num, size, size, 3, dtype=self.dtype, device=self.device).permute(0, 3, 1, 2)


# --- The CPU form -----------------------------------------------------------------------------------------------------

# A small view is mostly the interpreter's work, and threads would only take its lock from each other. Four threads on
# two cores, 64 px: 254 us of CPU time and 207 us elapsed per view, one after the other 148 and 147; 96 px: 362 and 276
# against 196 and 195.
_ALONE_BELOW = 128  # px
_alone = threading.Lock()


@dataclass(frozen=True, slots=True)
class Step:
    """What is done to one image for one view. None or False: left out."""

    flip: bool
    jitter: tuple[list[int], list[float], list[float]] | None  # order, factors, weights of the hue
    gray: bool
    kernel: np.ndarray | None  # weights from the centre outwards
    solarize: bool


def plan(draws: Draws, view: View) -> list[Step]:
    """The draws of a batch as `augment_rows` wants them; made once per batch: for a single image it costs 0.1 ms."""
    hue_mix_B4 = _hue_mix(draws.factor_B4[:, HUE].astype(np.float64))
    jitters = zip(draws.order_B4.tolist(), draws.factor_B4.tolist(), hue_mix_B4.tolist(), strict=True)
    # Short kernels are faster: a blur takes time in proportion to 8 + R.
    radii = _radius(draws.sigma_B, view.blur_radius).tolist()
    weights_BR = _gaussian(draws.sigma_B, view.blur_radius)
    kernels = [weights_R[: r + 1] if r > 0 else None for weights_R, r in zip(weights_BR, radii, strict=True)]
    return [
        Step(flip, jitter if jittered else None, gray, kernel, solarize)
        for flip, jittered, jitter, gray, kernel, solarize in zip(
            draws.flip_B.tolist(),
            draws.jitter_B.tolist(),
            jitters,
            draws.gray_B.tolist(),
            kernels,
            draws.solarize_B.tolist(),
            strict=True,
        )
    ]


def augment_rows(
    crops_B3SS: torch.Tensor,
    steps: Sequence[Step],
    view: View,
    mean: Sequence[float],
    std: Sequence[float],
    rows: Iterable[int],
    out_B3SS: torch.Tensor,
    tiles_P3ss: torch.Tensor | None = None,
) -> None:
    """Write the normalised views of `rows` into `out_B3SS` (any float dtype), on the CPU, in the calling thread.

    `steps` is the batch's `plan`. With `tiles_P3ss` [n*n*B, 3, S/n, S/n] the tiles of each view go there, in the order
    of `divide`, while it is in cache. What is written depends on the row alone, not on which rows come together or
    which thread does it.
    """
    if tiles_P3ss is not None:
        n = view.size // tiles_P3ss.shape[-1]
        cut_views = _cut(out_B3SS, n)
        cut_tiles = tiles_P3ss.permute(0, 2, 3, 1).unflatten(0, (n, n, -1))
    image = _image_of_this_thread(view.size)
    with _alone if view.size < _ALONE_BELOW else contextlib.nullcontext():
        for row in rows:
            step = steps[row]
            image.load(crops_B3SS[row], step.flip)
            if step.jitter is not None:
                image.jitter(*step.jitter)
            if step.gray:
                image.gray()
            if step.kernel is not None:
                image.blur(step.kernel)
            if step.solarize:
                image.solarize()
            image.store(out_B3SS[row], mean, std)
            if tiles_P3ss is not None:
                cut_tiles[:, :, row].copy_(cut_views[:, :, row])


_local = threading.local()


def _image_of_this_thread(size: int) -> _Image:
    images = _local.__dict__.setdefault("images", {})
    if size not in images:
        images[size] = _Image(size)
    return images[size]


class _Image:
    """One image on its way, in planes of float32 that are allocated once and stay in the core's cache.

    A pixel is `scale * stored + offset`. Brightness and contrast change only these two numbers; hue, blur and the
    rest commute with them, a clamp moves its bounds instead, and normalisation takes them in: most linear passes
    over the pixels are never made. A gray image has one plane.
    """

    _SMALLEST_SCALE = 1e-6  # below it the stored values are replaced, so that nothing divides by zero

    def __init__(self, size: int):
        S = size
        self.bytes = torch.empty(3, S, S, dtype=torch.uint8)
        # Hue goes from one set of planes to the other; both are sliced once, because slicing costs a microsecond.
        self.front, self.back = [(x, list(x)) for x in torch.empty(2, 3, S, S)]
        self.high, self.low, self.sum = torch.empty(3, S, S)
        self.interleaved = torch.empty(S, S, 3).permute(2, 0, 1)
        self.constant = np.zeros(3, dtype=np.float32)
        self.constant_0d = list(torch.from_numpy(self.constant))
        self.blurs: dict[int, _Blur] = {}  # by radius

    def load(self, crop_3SS: torch.Tensor, flip: bool) -> None:
        self.bytes.copy_(crop_3SS)
        self.pixels, self.planes = self.front
        self.spare = self.back
        self.pixels.copy_(self.bytes.flip(-1) if flip else self.bytes)
        self.scale, self.offset = 1 / 255, 0.0

    def jitter(self, order: Sequence[int], factor: Sequence[float], hue_mix: Sequence[float]) -> None:
        """The four operations in drawn order; `factor` by operation id."""
        for op in order:
            if factor[op] == _IDENTITY[op]:
                continue
            if op == BRIGHTNESS:
                self.brightness(factor[op])
            elif op == CONTRAST:
                self.contrast(factor[op])
            elif op == SATURATION:
                self.saturation(factor[op])
            else:
                self.hue(hue_mix)

    def brightness(self, factor: float) -> None:
        self._affine(factor, 0.0)

    def contrast(self, factor: float) -> None:
        means = self.pixels.mean((1, 2)).tolist()
        gray_mean = sum(g * (self.scale * m + self.offset) for g, m in zip(GRAY, means, strict=True))
        self._affine(factor, (1 - factor) * gray_mean)

    def saturation(self, factor: float) -> None:
        torch.lerp(self._gray_plane(), self.pixels, factor, out=self.pixels)
        self.offset *= factor + (1 - factor) * sum(GRAY)  # the weights do not quite sum to 1
        self._clamp_if(factor > 1)

    def hue(self, mix: Sequence[float]) -> None:
        x, (turned, out) = self.planes, self.spare
        torch.maximum(torch.maximum(x[0], x[1], out=self.high), x[2], out=self.high)
        torch.minimum(torch.minimum(x[0], x[1], out=self.low), x[2], out=self.low)
        torch.add(self.high, self.low, out=self.sum).mul_(mix[3])
        for i in range(3):
            torch.add(self.sum, x[i], alpha=mix[0], out=out[i])
            out[i].add_(x[i - 2], alpha=mix[1]).add_(x[i - 1], alpha=mix[2])
        torch.clamp(turned, self.low, self.high, out=turned)
        self.spare, (self.pixels, self.planes) = (self.pixels, self.planes), self.spare

    def gray(self) -> None:
        self.pixels = self._gray_plane().unsqueeze(0)
        self.offset *= sum(GRAY)

    def blur(self, weights_R: np.ndarray) -> None:
        radius = len(weights_R) - 1
        if radius not in self.blurs:
            self.blurs[radius] = _Blur(self.bytes.shape[-1], radius)
        self.pixels = self.blurs[radius](self.pixels, weights_R)

    def solarize(self) -> None:
        """x -> 1 - x from the threshold on: (1 - 2 step) x + step, where the step is 0 or 1."""
        threshold = (SOLARIZE_FROM - self.offset) / self.scale
        step = torch.ge(self.pixels, threshold, out=self.spare[0][: self.pixels.shape[0]])
        self.pixels.addcmul_(self.pixels, step, value=-2).add_(step, alpha=(1 - 2 * self.offset) / self.scale)

    def store(self, out_3SS: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
        # Another dtype goes through float32 of the same layout: converting while interleaving is twice as slow.
        target = out_3SS if out_3SS.dtype == torch.float32 else self.interleaved
        C = self.pixels.shape[0]  # 1 if gray
        for c in range(3):
            self.constant[c] = (self.offset - mean[c]) / std[c]
            torch.add(self.constant_0d[c], self.pixels[c % C], alpha=self.scale / std[c], out=target[c])
        if target is not out_3SS:
            out_3SS.copy_(target)

    def _affine(self, factor: float, addend: float) -> None:
        self.scale, self.offset = factor * self.scale, factor * self.offset + addend
        if self.scale < self._SMALLEST_SCALE:
            self.pixels.mul_(self.scale).add_(self.offset)
            self.scale, self.offset = 1.0, 0.0
        self._clamp_if(factor > 1)

    def _clamp_if(self, extrapolated: bool) -> None:
        """Only a factor above 1 leaves [0, 1]; below, the result lies between two values that are inside."""
        if extrapolated:
            self.pixels.clamp_(-self.offset / self.scale, (1 - self.offset) / self.scale)

    def _gray_plane(self) -> torch.Tensor:
        r, g, b = self.planes
        return torch.mul(r, GRAY[0], out=self.sum).add_(g, alpha=GRAY[1]).add_(b, alpha=GRAY[2])


class _Blur:
    """Gaussian blur of planes [C, S, S] by two passes of small matrix products, 16 outputs from 16 + 2R inputs: over
    rows and then over columns.

    Buffers, and all views of them that are used, are made once. The side is filled up to whole blocks; what lies there
    is finite and meets only weights of zero.
    """

    _TILE = 16  # outputs per row of a block: one AVX-512 register of floats; 8, 28 and 32 are slower

    def __init__(self, S: int, R: int):
        n = self._TILE
        num = -(-S // n)
        filled = num * n
        # The band matrix [n, n + 2R] has the kernel from the diagonal on. Read with rows one longer than its own, its
        # memory shows the kernel at the same place in each row: writing it is one assignment.
        memory = np.zeros(n * (n + 2 * R + 1), dtype=np.float32)
        self.band = memory.reshape(n, n + 2 * R + 1)[:, : 2 * R + 1]
        matrix = torch.from_numpy(memory[: n * (n + 2 * R)].reshape(n, n + 2 * R))
        self.matrix_rows = matrix.expand(num, -1, -1)
        self.matrix_columns = matrix.T.expand(num, -1, -1)

        wide = torch.zeros(3, S, filled + 2 * R)
        tall = torch.zeros(3, filled + 2 * R, filled)
        done = torch.zeros(3, filled, S)
        self.wide = wide[:, :, R : R + S]
        self.blurred = done[:, :S]
        self.wide_edges = self._mirrors(wide.numpy(), S, R)
        self.tall_edges = [
            (edge.transpose(0, 2, 1), mirrored.transpose(0, 2, 1))
            for edge, mirrored in self._mirrors(tall.numpy().transpose(0, 2, 1), S, R)
        ]
        # Overlapping windows of n + 2R as a batch of matrices, and where their n outputs go.
        self.over_rows = [
            (w.unfold(1, n + 2 * R, n).transpose(0, 1), t[R : R + S].view(S, num, n).transpose(0, 1))
            for w, t in zip(wide, tall, strict=True)
        ]
        self.over_columns = [
            (t[:, :S].unfold(0, n + 2 * R, n).transpose(1, 2), d.view(num, n, S))
            for t, d in zip(tall, done, strict=True)
        ]

    def __call__(self, pixels_CSS: torch.Tensor, weights_R: np.ndarray) -> torch.Tensor:
        """The blurred planes, which are valid until the next call."""
        C = len(pixels_CSS)
        self.band[:] = np.concatenate((weights_R[:0:-1], weights_R))
        self.wide[:C].copy_(pixels_CSS)
        for edge, mirrored in self.wide_edges:
            np.copyto(edge[:C], mirrored[:C])
        for blocks, outputs in self.over_rows[:C]:
            torch.bmm(blocks, self.matrix_columns, out=outputs)
        for edge, mirrored in self.tall_edges:
            np.copyto(edge[:C], mirrored[:C])
        for blocks, outputs in self.over_columns[:C]:
            torch.bmm(self.matrix_rows, blocks, out=outputs)
        return self.blurred[:C]

    @staticmethod
    def _mirrors(x: np.ndarray, S: int, R: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(edge, its reflection) for both ends of the last axis, whose middle is [R, R + S)."""
        return [
            (x[..., :R], x[..., 2 * R : R : -1]),
            (x[..., R + S : S + 2 * R], x[..., R + S - 2 : S - 2 : -1]),
        ]
