"""Augmentation on the CPU, image by image: an image stays in the core's cache, and only what was drawn is computed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from loaders.augment.shared import GRAY, IDENTITY, SOLARIZE_FROM, cut, gaussian, hue_mix, radius
from loaders.draw import BRIGHTNESS, CONTRAST, HUE, SATURATION, Draws
from loaders.views import View

# A small view is mostly the interpreter's work, and threads would only take its lock from each other. Four threads on
# two cores, 64 px: 254 us of CPU time and 207 us elapsed per view, one after the other 148 and 147; 96 px: 362 and 276
# against 196 and 195.
_ALONE_BELOW = 128  # px
_alone = threading.Lock()


@dataclass(frozen=True, slots=True)
class Operations:
    """The operations that one image goes through for one view. None or False: left out."""

    flip: bool
    jitter: tuple[list[int], list[float], list[float]] | None  # order, factors, weights of the hue
    gray: bool
    kernel: np.ndarray | None  # weights from the centre outwards
    solarize: bool


def operations(draws: Draws, view: View) -> list[Operations]:
    """The operations of each image of a batch, for `augment_rows`: one call per batch, as one image takes 0.1 ms."""
    hue_mix_B4 = hue_mix(draws.factor_B4[:, HUE].astype(np.float64))
    jitters = zip(draws.order_B4.tolist(), draws.factor_B4.tolist(), hue_mix_B4.tolist(), strict=True)
    # Short kernels are faster: a blur takes time in proportion to 8 + R.
    radii = radius(draws.sigma_B, view.blur_radius).tolist()
    weights_BR = gaussian(draws.sigma_B, view.blur_radius)
    kernels = [weights_R[: r + 1] if r > 0 else None for weights_R, r in zip(weights_BR, radii, strict=True)]
    return [
        Operations(flip, jitter if jittered else None, gray, kernel, solarize)
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
    todo: Sequence[Operations],
    view: View,
    mean: Sequence[float],
    std: Sequence[float],
    rows: Iterable[int],
    out_B3SS: torch.Tensor,
    tiles_P3ss: torch.Tensor | None = None,
) -> None:
    """Write the normalised views of `rows` into `out_B3SS` (any float dtype), on the CPU, in the calling thread.

    `todo` are the batch's `operations`. With `tiles_P3ss` [n*n*B, 3, S/n, S/n] the tiles of each view go there, in
    the order of `divide`, while the view is in cache. What is written depends on the row alone, not on which rows come
    together or which thread does it.
    """
    if tiles_P3ss is not None:
        n = view.size // tiles_P3ss.shape[-1]
        cut_views = cut(out_B3SS, n)
        cut_tiles = tiles_P3ss.permute(0, 2, 3, 1).unflatten(0, (n, n, -1))
    image = _image_of_this_thread(view.size)
    with _alone if view.size < _ALONE_BELOW else contextlib.nullcontext():
        for row in rows:
            its = todo[row]
            image.load(crops_B3SS[row], its.flip)
            if its.jitter is not None:
                image.jitter(*its.jitter)
            if its.gray:
                image.gray()
            if its.kernel is not None:
                image.blur(its.kernel)
            if its.solarize:
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
    """An image while it is augmented, in planes of float32 that are allocated once and stay in the core's cache.

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
            if factor[op] == IDENTITY[op]:
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
