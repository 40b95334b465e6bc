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
_COINS, _FACTORS, _REST = 16, 17, 18  # blocks of the counter
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
    counter: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], key: tuple[int, int]
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
    return tuple(word.astype(np.uint32) for word in (c0, c1, c2, c3))


def draw(
    spec: ViewSpec, *, seed: int, epoch: int, index_B: np.ndarray, height_B: np.ndarray, width_B: np.ndarray
) -> list[Draws]:
    """Parameters of the K views of a batch; `index_B` are sample ids, `height_B` and `width_B` their size in
    pixels.

    Raises UserError if seed or epoch is outside [0, 2**32).
    """
    key = _key(seed, epoch)
    index_B = np.asarray(index_B).astype(np.uint64)
    height_B = np.asarray(height_B).astype(np.int64)
    width_B = np.asarray(width_B).astype(np.int64)
    return [_draw_view(view, key, number, index_B, height_B, width_B) for number, view in enumerate(spec.views)]


def permutation(n: int, *, seed: int, epoch: int) -> np.ndarray:
    """A uniform random permutation of 0..n-1 as int64 [N], the same for ever.

    Sorts 64-bit keys, two from each Philox block. The sort is stable, so even a tie (probability below 1e-7
    for ImageNet) has one outcome whatever the sorting code of the numpy at hand."""
    block_H = np.arange((n + 1) // 2, dtype=np.uint64)
    words = philox((block_H & _LOW, block_H >> _SHIFT, _PERMUTATION, 0), _key(seed, epoch))
    w0, w1, w2, w3 = (word.astype(np.uint64) for word in words)
    key_N = np.stack(((w0 << _SHIFT) | w1, (w2 << _SHIFT) | w3), axis=1).reshape(-1)[:n]
    return np.argsort(key_N, kind="stable")


def _key(seed: int, epoch: int) -> tuple[int, int]:
    """The pair itself: different pairs give different keys, and Philox needs no further mixing of its key."""
    for name, value in (("seed", seed), ("epoch", epoch)):
        if not 0 <= value < 2**32:
            raise UserError(f"{name} is {value}: give a whole number from 0 to 4294967295")
    return int(seed), int(epoch)


def _draw_view(
    view: View,
    key: tuple[int, int],
    number: int,
    index_B: np.ndarray,
    height_B: np.ndarray,
    width_B: np.ndarray,
) -> Draws:
    B = len(index_B)
    if view.center is not None:
        return Draws(
            box_B4=_center_box(view.center, height_B, width_B),
            flip_B=np.zeros(B, dtype=bool),
            jitter_B=np.zeros(B, dtype=bool),
            order_B4=np.tile(ORDERS[0], (B, 1)),
            factor_B4=np.tile(np.float32([1, 1, 1, 0]), (B, 1)),
            gray_B=np.zeros(B, dtype=bool),
            sigma_B=np.zeros(B, dtype=np.float32),
            solarize_B=np.zeros(B, dtype=bool),
        )

    def words(block: int, rows: np.ndarray | slice = slice(None)) -> tuple[np.ndarray, ...]:
        return philox((index_B[rows] & _LOW, index_B[rows] >> _SHIFT, number, block), key)

    jitter, gray, blur, solarize = map(_unit, words(_COINS))
    flip, order, sigma, _ = words(_REST)
    ranges = [(max(0.0, 1 - s), 1 + s) for s in (view.brightness, view.contrast, view.saturation)]
    ranges.append((-view.hue, view.hue))
    factors = [_between(word, low, high) for word, (low, high) in zip(words(_FACTORS), ranges, strict=True)]
    return Draws(
        box_B4=_random_box(view, words, height_B, width_B),
        flip_B=_unit(flip) < view.flip_p,
        jitter_B=jitter < view.jitter_p,
        order_B4=ORDERS[_below(order, np.uint64(len(ORDERS)))],
        factor_B4=np.stack(factors, axis=1).astype(np.float32),
        gray_B=gray < view.gray_p,
        sigma_B=np.where(blur < view.blur_p, _between(sigma, *view.blur_sigma), 0).astype(np.float32),
        solarize_B=solarize < view.solarize_p,
    )


def _random_box(view: View, words, height_B: np.ndarray, width_B: np.ndarray) -> np.ndarray:
    """RandomResizedCrop.get_params: ten attempts at area and ratio, else the largest centred box of legal
    ratio."""
    box_B4 = _fallback_box(view.ratio, height_B, width_B)
    open_ = np.arange(len(height_B))  # rows without an accepted attempt
    log_low, log_high = np.log(view.ratio)
    for attempt in range(_CROP_ATTEMPTS):
        if not len(open_):
            break
        height, width = height_B[open_], width_B[open_]
        area_word, ratio_word, top_word, left_word = words(attempt, open_)
        area = height * width * _between(area_word, *view.scale)
        ratio = np.exp(_between(ratio_word, log_low, log_high))
        w = np.rint(np.sqrt(area * ratio)).astype(np.int64)  # rint is Python's round: half to even
        h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        rows, h, w = open_[fits], h[fits], w[fits]
        box_B4[rows, 0] = _below(top_word[fits], (height[fits] - h + 1).astype(np.uint64))
        box_B4[rows, 1] = _below(left_word[fits], (width[fits] - w + 1).astype(np.uint64))
        box_B4[rows, 2] = h
        box_B4[rows, 3] = w
        open_ = open_[~fits]
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


def _below(word: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Whole number in [0, n), n as uint64; its bias, below n / 2**32, is far under anything a crop could
    show."""
    return ((word.astype(np.uint64) * n) >> _SHIFT).astype(np.int64)
