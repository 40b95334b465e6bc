"""Every random number of a sample, from (seed, epoch, sample id, view) alone.

A counter-based generator (Philox4x32-10, Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
1, 2, 3", SC 2011) is keyed by (seed, epoch) and counts (sample id, view, block). So a sample's views depend
neither on the batch it is in, nor on the backend, the number of workers or processes, or what was drawn
before. Only numpy is needed.

The distributions are torchvision's: RandomResizedCrop, ColorJitter inside RandomApply, RandomGrayscale,
GaussianBlur inside RandomApply, RandomSolarize, RandomHorizontalFlip.

Counter: word 0 and 1 the sample id (low, high), word 2 the view, word 3 the block. Of a block's four words,
    block 0-9    attempt 0-9 of the crop: area, ratio, top, left
    block 16     coins: jitter, gray, blur, solarize
    block 17     factors: brightness, contrast, saturation, hue
    block 18     flip coin, order of the four jitter operations, sigma of the blur, unused
Every field has its own word, so that changing one strength or probability leaves all other draws as they are.

Shapes: B samples of a batch, N items of a permutation.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from loaders.errors import UserError
from loaders.views import View, ViewSpec

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # operation ids, ColorJitter's numbering
ORDERS = np.array(list(itertools.permutations(range(4))), dtype=np.int64)  # [24, 4], lexicographic

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))  # Philox4x32, Salmon et al. 2011, Table 2
_WEYL = (0x9E3779B9, 0xBB67AE85)  # key increments: golden ratio and sqrt(3) - 1, ibid.
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)

_CROP_ATTEMPTS = 10  # torchvision.transforms.RandomResizedCrop.get_params
_BLOCKS = (*range(_CROP_ATTEMPTS), 16, 17, 18)  # of the counter; the last three:
_COINS, _FACTORS, _REST = -3, -2, -1
_PERMUTATION = 0xFFFFFFFF  # in the view word: no view has this number


@dataclass
class Draws:
    """The parameters of one view for the B samples of a batch.

    `box_B4`: top, left, height, width in pixels of the stored image. `order_B4`: ids of the jitter
    operations, the first to run first. `factor_B4`: by operation id; 1 (hue: 0) does nothing. `sigma_B`:
    pixels, 0 without blur.
    """

    box_B4: np.ndarray  # int32
    flip_B: np.ndarray  # bool
    jitter_B: np.ndarray  # bool
    order_B4: np.ndarray  # int64
    factor_B4: np.ndarray  # float32
    gray_B: np.ndarray  # bool
    sigma_B: np.ndarray  # float32
    solarize_B: np.ndarray  # bool


def philox(
    counter: tuple[np.ndarray, np.ndarray, np.ndarray | int, np.ndarray | int], key: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Philox4x32-10: four independent uniform uint32 words per counter.

    The four counter words hold values below 2**32 and broadcast against each other.
    """
    # Products need 64 bits; keeping the words there too spares conversions.
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(word, dtype=np.uint64) for word in counter))
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0 = c0 * _MULTIPLIERS[0]
        product1 = c2 * _MULTIPLIERS[1]
        c0 = (product1 >> _SHIFT) ^ c1 ^ np.uint64(k0)
        c2 = (product0 >> _SHIFT) ^ c3 ^ np.uint64(k1)
        c1 = product1 & _LOW
        c3 = product0 & _LOW
        k0 = (k0 + _WEYL[0]) & 0xFFFFFFFF
        k1 = (k1 + _WEYL[1]) & 0xFFFFFFFF
    return c0.astype(np.uint32), c1.astype(np.uint32), c2.astype(np.uint32), c3.astype(np.uint32)


def draw(
    spec: ViewSpec, *, seed: int, epoch: int, index_B: np.ndarray, height_B: np.ndarray, width_B: np.ndarray
) -> list[Draws]:
    """Parameters of the K views of a batch; `index_B` are sample ids, `height_B` and `width_B` sizes in pixels.

    Raises UserError if seed or epoch is outside [0, 2**32).
    """
    key = _key(seed, epoch)
    index_B = np.asarray(index_B).astype(np.uint64)
    height_B = np.asarray(height_B).astype(np.int64)
    width_B = np.asarray(width_B).astype(np.int64)
    # All words at once: with small batches the many small steps of the generator cost, not the numbers. Most attempts
    # at a crop are drawn in vain, which is cheaper than asking again: K = 4 takes 0.5 ms per batch of 32, not 2.6, and
    # 1.5 of 512, not 4.0; this is time in which no other Python thread runs.
    number_K1 = np.arange(spec.K)[:, None]
    words = philox((index_B & _LOW, index_B >> _SHIFT, number_K1, np.array(_BLOCKS)[:, None, None]), key)
    return [_draw_view(view, [word[:, k] for word in words], height_B, width_B) for k, view in enumerate(spec.views)]


def permutation(n: int, *, seed: int, epoch: int, stream: int = 0) -> np.ndarray:
    """A uniform random permutation of 0..n-1 as int64 [N], the same on every machine; independent for every `stream`.

    Sorts 64-bit keys, two from each Philox block. The sort is stable, so even a tie (probability below 1e-7
    for ImageNet) has one outcome whatever the sorting code of the numpy at hand."""
    block_H = np.arange((n + 1) // 2, dtype=np.uint64)
    words = philox((block_H & _LOW, block_H >> _SHIFT, _PERMUTATION, stream), _key(seed, epoch))
    w0, w1, w2, w3 = (word.astype(np.uint64) for word in words)
    key_N = np.stack(((w0 << _SHIFT) | w1, (w2 << _SHIFT) | w3), axis=1).reshape(-1)[:n]
    return np.argsort(key_N, kind="stable")


def _key(seed: int, epoch: int) -> tuple[int, int]:
    """The key of the generator: the pair itself, as Philox needs no further mixing of its key."""
    for name, value in (("seed", seed), ("epoch", epoch)):
        if not 0 <= value < 2**32:
            raise UserError(f"{name} is {value}: give a whole number from 0 to 4294967295")
    return int(seed), int(epoch)


def _draw_view(view: View, words: list[np.ndarray], height_B: np.ndarray, width_B: np.ndarray) -> Draws:
    """Draws of one view. `words` are the four words of each block, [blocks, B] each, in the order of `_BLOCKS`."""
    B = len(height_B)
    if view.center is not None:
        return Draws(
            box_B4=_center_box(view.center, height_B, width_B),
            flip_B=np.zeros(B, dtype=bool),
            jitter_B=np.zeros(B, dtype=bool),
            order_B4=np.tile(ORDERS[0], (B, 1)),
            factor_B4=np.tile(np.array([1, 1, 1, 0], np.float32), (B, 1)),
            gray_B=np.zeros(B, dtype=bool),
            sigma_B=np.zeros(B, dtype=np.float32),
            solarize_B=np.zeros(B, dtype=bool),
        )

    jitter, gray, blur, solarize = (_unit(word[_COINS]) for word in words)
    flip, order, sigma, _ = (word[_REST] for word in words)
    ranges = [(max(0.0, 1 - s), 1 + s) for s in (view.brightness, view.contrast, view.saturation)]
    ranges.append((-view.hue, view.hue))
    factor_words = (word[_FACTORS] for word in words)
    factors = [_between(word, low, high) for word, (low, high) in zip(factor_words, ranges, strict=True)]
    return Draws(
        box_B4=_random_box(view, [word[:_CROP_ATTEMPTS] for word in words], height_B, width_B),
        flip_B=_unit(flip) < view.flip_p,
        jitter_B=jitter < view.jitter_p,
        order_B4=ORDERS[_below(order, np.uint64(len(ORDERS)))],
        factor_B4=np.stack(factors, axis=1).astype(np.float32),
        gray_B=gray < view.gray_p,
        sigma_B=np.where(blur < view.blur_p, _between(sigma, *view.blur_sigma), 0).astype(np.float32),
        solarize_B=solarize < view.solarize_p,
    )


def _random_box(view: View, words: list[np.ndarray], height_B: np.ndarray, width_B: np.ndarray) -> np.ndarray:
    """RandomResizedCrop.get_params: the first of ten attempts [A, B] at area and ratio that fits, else the largest
    centred box of legal ratio."""
    area_word, ratio_word, top_word, left_word = words
    area_AB = height_B * width_B * _between(area_word, *view.scale)
    ratio_AB = np.exp(_between(ratio_word, *np.log(view.ratio)))
    w_AB = np.rint(np.sqrt(area_AB * ratio_AB)).astype(np.int64)  # rint is Python's round: half to even
    h_AB = np.rint(np.sqrt(area_AB / ratio_AB)).astype(np.int64)
    fits_AB = (w_AB > 0) & (w_AB <= width_B) & (h_AB > 0) & (h_AB <= height_B)
    box_B4 = _fallback_box(view.ratio, height_B, width_B)
    rows = np.flatnonzero(fits_AB.any(0))
    first = fits_AB.argmax(0)[rows], rows
    h, w = h_AB[first], w_AB[first]
    box_B4[rows, 0] = _below(top_word[first], (height_B[rows] - h + 1).astype(np.uint64))
    box_B4[rows, 1] = _below(left_word[first], (width_B[rows] - w + 1).astype(np.uint64))
    box_B4[rows, 2] = h
    box_B4[rows, 3] = w
    return box_B4


def _fallback_box(ratio: tuple[float, float], height_B: np.ndarray, width_B: np.ndarray) -> np.ndarray:
    image_ratio = width_B / height_B
    h = np.where(image_ratio < ratio[0], np.rint(width_B / ratio[0]).astype(np.int64), height_B)
    w = np.where(image_ratio > ratio[1], np.rint(height_B * ratio[1]).astype(np.int64), width_B)
    return np.stack(((height_B - h) // 2, (width_B - w) // 2, h, w), axis=1).astype(np.int32)


def _center_box(fraction: float, height_B: np.ndarray, width_B: np.ndarray) -> np.ndarray:
    side = np.maximum(1, np.rint(fraction * np.minimum(height_B, width_B)).astype(np.int64))
    # Half pixels round to even, as in torchvision's center_crop.
    top, left = (np.rint((length - side) / 2).astype(np.int64) for length in (height_B, width_B))
    return np.stack((top, left, side, side), axis=1).astype(np.int32)


def _unit(word: np.ndarray) -> np.ndarray:
    """uint32 -> float64 in [0, 1)."""
    return word * 2.0**-32


def _between(word: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + (high - low) * _unit(word)


def _below(word: np.ndarray, n: np.ndarray | np.uint64) -> np.ndarray:
    """Whole number in [0, n), n as uint64. Its bias, below n / 2**32, is far under anything a crop could show."""
    return ((word.astype(np.uint64) * n) >> _SHIFT).astype(np.int64)
