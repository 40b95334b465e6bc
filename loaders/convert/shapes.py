"""Generated, labelled pictures for a machine that has no data set yet (`fastssl-convert shapes`).

A class is a kind of thing: a silhouette, the surface it is made of, and about how large and how many such things
come (a few wide brick arrows, a swarm of small striped stars). A picture shows several things of one kind, each
with its own place, size, rotation, squash, mirror, light and shadow, its own two colours and texture phase, over
clutter, perhaps behind a bar, seen by a camera of random exposure, tint and noise, at a random image size.

So no pixel, colour or position names the class: nearest neighbours on raw pixels stay near chance. And as every
thing has colours of its own, its kind is most of what two crops of a picture share: that is why a few minutes of
self-supervised training pay here.

Legend: H, W pixels of the picture. One picture is one call of a pure function, so threads need no lock.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from loaders.errors import UserError

DEFAULT_NUM = {"train": 5000, "val": 1000}
SIDE_PX = (96, 160)  # shortest and longest side; height and width are drawn independently
QUALITY = 90


@dataclass(frozen=True)
class Plane:
    """Coordinates [H, W] of every pixel in some frame: u right, v down; or polar r, a (radians)."""

    u: np.ndarray
    v: np.ndarray

    @cached_property
    def r(self) -> np.ndarray:
        return np.hypot(self.u, self.v)

    @cached_property
    def a(self) -> np.ndarray:
        return np.arctan2(self.v, self.u)


def cell(x: np.ndarray) -> np.ndarray:
    """Place of x in its unit cell, from -0.5 to 0.5 with 0 in the middle."""
    return x - np.floor(x) - 0.5


def zigzag(x: np.ndarray) -> np.ndarray:
    """Triangle wave of period 1 from -1 to 1: 1 at whole numbers."""
    return 4 * np.abs(cell(x)) - 1


def box(p: Plane, half_u: float, half_v: float) -> np.ndarray:
    return np.maximum(np.abs(p.u) - half_u, np.abs(p.v) - half_v)


def polygon(p: Plane, n: int, waist: float) -> np.ndarray:
    """Star with n tips at radius 1 and the corners between them at radius waist (cos(pi / n): a plain n-gon)."""
    from_tip = np.abs(cell(p.a * n / (2 * math.pi) + 0.5)) * 2 * math.pi / n
    u, v = waist * math.cos(math.pi / n) - 1, waist * math.sin(math.pi / n)  # the edge from tip to corner
    return (v * (p.r * np.cos(from_tip) - 1) - u * p.r * np.sin(from_tip)) / math.hypot(u, v)


def bricks(p: Plane) -> np.ndarray:
    return 1 - 6 * np.maximum(np.abs(cell(p.v)) - 0.2, 2 * np.abs(cell(p.u / 2 + np.floor(p.v) / 2)) - 0.7)


def scales(p: Plane) -> np.ndarray:
    """Rows of discs, every row half a disc aside and half under the row above."""
    u, v = p.u + np.floor(p.v) / 2, cell(p.v)
    above, below = np.hypot(cell(u + 0.5), v + 0.5), np.hypot(cell(u), v - 0.5)  # from the centres of two rows
    return 1 - 9 * np.abs(np.where(above < 0.7, above, below) - 0.62)


def honeycomb(p: Plane) -> np.ndarray:
    """Hexagons by the nearer of two interleaved rectangular lattices."""
    u, v = p.u * 0.8, p.v * 0.8
    lattice = [(cell(u + s), cell(v / 3**0.5 + s) * 3**0.5) for s in (0, 0.5)]
    nearer = np.hypot(*lattice[0]) < np.hypot(*lattice[1])
    u, v = (np.abs(np.where(nearer, a, b)) for a, b in zip(*lattice, strict=True))
    return 8 * (0.4 - np.maximum(u, u / 2 + v * 0.75**0.5))


def mottle(p: Plane) -> np.ndarray:
    return np.sin(3.1 * p.u + 2 * np.sin(2.3 * p.v)) + np.sin(3.7 * p.v + 2 * np.sin(1.9 * p.u))


def weave(p: Plane) -> np.ndarray:
    u, v = p.u / 2, p.v / 2
    return zigzag(np.where((np.floor(u) + np.floor(v)) % 2 == 0, 4 * u, 4 * v) + 0.5)


# Distance to the edge on the thing's plane, negative inside; every silhouette about fills the unit disc.
SILHOUETTES: dict[str, Callable[[Plane], np.ndarray]] = {
    "star": lambda p: polygon(p, 5, 0.48),
    "triangle": lambda p: polygon(p, 3, 0.5),
    "ring": lambda p: np.abs(p.r - 0.68) - 0.32,
    "cross": lambda p: np.minimum(box(p, 0.95, 0.34), box(p, 0.34, 0.95)),
    "gear": lambda p: np.maximum(p.r - 0.86 - 0.12 * np.clip(3 * np.cos(9 * p.a), -1, 1), 0.22 - p.r),
    "leaf": lambda p: np.hypot(p.u, np.abs(p.v) + 0.5) - 1.12,
    "crescent": lambda p: np.maximum(p.r - 1, 0.72 - np.hypot(p.u - 0.55, p.v)),
    "arrow": lambda p: np.minimum(
        np.maximum(0.66 * p.u + 0.75 * np.abs(p.v) - 0.63, -p.u),
        np.maximum(np.abs(p.u + 0.45) - 0.5, np.abs(p.v) - 0.38),
    ),
    "heart": lambda p: np.hypot(p.u, 1.1 * p.v + 0.2 - 0.6 * np.sqrt(np.abs(p.u))) - 0.85,
    "flower": lambda p: p.r - 0.76 - 0.22 * np.cos(6 * p.a),
    "drop": lambda p: np.minimum(
        np.hypot(p.u, p.v - 0.36) - 0.62, np.maximum(0.89 * np.abs(p.u) - 0.455 * (p.v + 1), p.v - 0.08)
    ),
    "fan": lambda p: np.maximum(np.hypot(p.u, p.v + 0.5) - 1.0, -0.5 - p.v),
}

# A wave of height about 1 on the texture's plane, whose unit is one period; its sign picks one of two colours.
SURFACES: dict[str, Callable[[Plane], np.ndarray]] = {
    "striped": lambda p: zigzag(p.u),
    "chequered": lambda p: 2 * np.sin(math.pi * p.u) * np.sin(math.pi * p.v),
    "dotted": lambda p: 5 * (0.3 - np.hypot(cell(p.u), cell(p.v))),
    "ringed": lambda p: zigzag(p.r),
    "wavy": lambda p: zigzag(p.v + 0.4 * zigzag(p.u / 2)),
    "brick": bricks,
    "scaly": scales,
    "honeycomb": honeycomb,
    "mottled": mottle,
    "netted": lambda p: 6 * (np.maximum(np.abs(cell(p.u)), np.abs(cell(p.v))) - 0.38),
    "woven": weave,
    "rayed": lambda p: zigzag(p.a * 16 / (2 * math.pi)),
}


class Kind(NamedTuple):
    """Properties that all pictures of a class share."""

    radius: float  # of a thing, over the shorter side of the picture; up to SPREAD times larger or smaller
    periods: float  # of the texture in one radius, with the same SPREAD
    num_things: int  # in a picture, give or take a quarter


KINDS = {  # surface_silhouette; the scales differ on purpose: a thing's size is as much its nature as its outline
    "striped_star": Kind(0.16, 2.2, 14),
    "honeycomb_triangle": Kind(0.45, 1.6, 4),
    "chequered_ring": Kind(0.42, 4.5, 5),
    "dotted_cross": Kind(0.36, 2.4, 6),
    "ringed_gear": Kind(0.24, 2.2, 9),
    "wavy_leaf": Kind(0.32, 1.2, 7),
    "mottled_crescent": Kind(0.45, 2.0, 5),
    "brick_arrow": Kind(0.40, 5.5, 5),
    "scaly_heart": Kind(0.15, 1.4, 16),
    "rayed_flower": Kind(0.20, 2.2, 10),
    "netted_drop": Kind(0.22, 3.2, 10),
    "woven_fan": Kind(0.56, 2.2, 4),
}
SPREAD = 1.2
CLASSES = tuple(KINDS)


class Dice:
    """The random numbers of one image: uniform draws only, whose stream numpy keeps stable."""

    def __init__(self, index: int, seed: int, split: str) -> None:
        key = np.array([seed, 2 * index + (split == "val")], dtype=np.uint64)
        self.rng = np.random.Generator(np.random.Philox(key=key))

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.rng.random()

    def whole(self, low: int, high: int) -> int:
        return int(self.between(low, high + 1))

    def colour(self) -> np.ndarray:
        """A colour [3] in 0..1: any hue, mostly muted, any lightness."""
        hue = np.abs((self.rng.random() * 6 + np.array([0, 4, 2])) % 6 - 3) - 1
        pure = np.clip(hue, 0, 1) - 0.5
        return np.clip(self.between(0.1, 0.9) + self.between(0, 0.3) * pure, 0, 1).astype(np.float32)


def rgb(colour: np.ndarray) -> tuple[int, int, int]:
    r, g, b = (int(255 * c) for c in colour)
    return r, g, b


def backdrop(dice: Dice, height: int, width: int) -> Image.Image:
    """Soft muted blotches under up to 3 scattered ellipses, polygons and bars, a little out of focus."""
    grid = dice.rng.random((dice.whole(2, 6), dice.whole(2, 6), 3), dtype=np.float32) - 0.5
    grid = np.clip(0.5 + 0.25 * (dice.colour() - 0.5) + dice.between(0.1, 0.3) * grid, 0, 1)
    blotches = Image.fromarray((255 * grid).astype(np.uint8))
    canvas = blotches.resize((2 * width, 2 * height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(canvas)  # at twice the size: reduced below, which smooths the edges
    for _ in range(dice.whole(0, 3)):
        x, y, size = dice.between(0, 2 * width), dice.between(0, 2 * height), dice.between(6, 60)
        fill, kind = rgb(dice.colour()), dice.whole(0, 2)
        if kind == 0:
            aspect = dice.between(0.4, 1)
            draw.ellipse((x - size, y - aspect * size, x + size, y + aspect * size), fill=fill)
        elif kind == 1:
            draw.regular_polygon((x, y, size), dice.whole(3, 6), rotation=dice.between(0, 360), fill=fill)
        else:
            angle, length = dice.between(0, 2 * math.pi), dice.between(30, 300)
            end = (x + length * math.cos(angle), y + length * math.sin(angle))
            draw.line(((x, y), end), fill=fill, width=dice.whole(2, 14))
    return canvas.reduce(2).filter(ImageFilter.BoxBlur(dice.between(0, 2)))


def frame(dice: Dice, x: np.ndarray, y: np.ndarray, scale: float, squash: float) -> Plane:
    """Pixels (x, y) in a frame turned by any angle, perhaps mirrored, with `scale` pixels to the unit."""
    angle = dice.between(0, 2 * math.pi)
    c, s = math.cos(angle) / scale, math.sin(angle) / scale
    stretch = dice.between(1, squash) * (1 if dice.rng.random() < 0.5 else -1)
    return Plane((c * x + s * y).astype(np.float32), (stretch * (c * y - s * x)).astype(np.float32))


def paint_thing(dice: Dice, picture: np.ndarray, kind: str) -> None:
    """Draw one thing of a kind, with its shadow, into the picture [H, W, 3] in place; its edge may be cut off."""
    surface, silhouette = kind.split("_")
    height, width, _ = picture.shape
    radius = KINDS[kind].radius * dice.between(1 / SPREAD, SPREAD) * min(height, width)
    periods = KINDS[kind].periods * dice.between(1 / SPREAD, SPREAD)
    centre_y, centre_x = dice.between(0.1, 0.9) * height, dice.between(0.1, 0.9) * width
    top, left = max(0, int(centre_y - 1.2 * radius)), max(0, int(centre_x - 1.2 * radius))
    bottom, right = int(centre_y + 1.2 * radius) + 1, int(centre_x + 1.2 * radius) + 1
    window = picture[top:bottom, left:right]
    y, x = np.mgrid[: window.shape[0], : window.shape[1]].astype(np.float32)
    y += top - centre_y
    x += left - centre_x

    distance = SILHOUETTES[silhouette](frame(dice, x, y, radius, squash=1.3)) * radius
    mask = np.clip(0.5 - distance, 0, 1)[..., None]
    skin = frame(dice, x, y, radius / periods, squash=1.2)
    if surface not in ("ringed", "rayed"):  # these keep their centre on the thing
        skin = Plane(skin.u + dice.rng.random(), skin.v + dice.rng.random())
    wave = np.clip(0.5 + dice.between(1, 2) * SURFACES[surface](skin), 0, 1)[..., None]
    base, other = dice.colour(), dice.colour()
    step = dice.between(0.3, 0.6) * (1 if base.mean() < 0.5 else -1)  # the two must differ in lightness
    other = np.clip(other - other.mean() + base.mean() + step, 0, 1)
    if dice.rng.random() < 0.5:
        base, other = other, base
    light = dice.between(0, 2 * math.pi)
    toward = (math.cos(light) * x + math.sin(light) * y) / radius
    paint = (base + (other - base) * wave) * (1 + dice.between(0, 0.4) * toward[..., None])
    window *= 1 - dice.between(0.1, 0.5) * np.clip(1 - distance / (0.15 * radius), 0, 1)[..., None]
    window += (paint - window) * mask


def image(index: int, *, seed: int = 0, split: str = "train") -> tuple[Image.Image, int]:
    """Picture `index` of a split, RGB, before compression, and its label: the position in `CLASSES`.

    The label is index modulo the number of classes, so any stretch of indices is balanced. The splits share no
    random number. Raises UserError for an unknown split or a negative index or seed.
    """
    if split not in DEFAULT_NUM or index < 0 or seed < 0:
        raise UserError(
            f"shapes has no image {index} in split {split!r} with seed {seed}: use split train or val, the rest >= 0"
        )
    dice, label = Dice(index, seed, split), index % len(CLASSES)
    height, width = dice.whole(*SIDE_PX), dice.whole(*SIDE_PX)
    picture = np.asarray(backdrop(dice, height, width), dtype=np.float32) / 255
    for _ in range(int(KINDS[CLASSES[label]].num_things * dice.between(0.75, 1.25))):
        paint_thing(dice, picture, CLASSES[label])
    y, x = np.mgrid[:height, :width].astype(np.float32)
    if dice.rng.random() < 0.5:  # in front: a bar across the picture
        bar = frame(dice, x - dice.between(0, width), y - dice.between(0, height), 1, squash=1)
        cover = np.clip(dice.between(1.5, 4) + 0.5 - np.abs(bar.v), 0, 1)
        picture += (dice.colour() - picture) * cover[..., None]

    tint = np.array([dice.between(0.97, 1.03) for _ in range(3)], dtype=np.float32)
    picture = 0.5 + dice.between(0.8, 1.1) * (picture * tint - 0.5) + dice.between(-0.05, 0.05)
    noise = dice.rng.random((height, width, 1), dtype=np.float32) - 0.5
    picture += dice.between(0.02, 0.05) * noise
    return Image.fromarray((255 * np.clip(picture, 0, 1) + 0.5).astype(np.uint8)), label


def render(index: int, *, seed: int = 0, split: str = "train") -> tuple[bytes, int]:
    """Picture `index` as a JPEG: the file's bytes and the label. The same bytes on every call, thread and process."""
    picture, label = image(index, seed=seed, split=split)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue(), label
