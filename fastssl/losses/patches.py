"""Combinatorial patches: predictions from combinations of tiles (Ci et al., "Fast-MoCo", ECCV 2022).

The network sees n x n tiles of a view, the features of m of them are averaged, and every such combination predicts the
target of the other view. Targets are made from whole views. Section 3.2; the variants are those of its tables.

Legend: B images of this process, T target views, P tiles (or crops), C combinations of them, M predictions, D features.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.conditions import above, one_of, other_than
from fastssl.losses.ops import Owner, combine, divide, subsets
from fastssl.networks.backbones import feature_map
from fastssl.networks.encode import encode, in_groups
from loaders import Batch, ViewSpec
from loaders.checks import Options, above_zero, at_least, flag, need
from loaders.errors import UserError

Variant = Literal[
    "off",
    "divide-encode-combine",
    "divide-combine-encode",
    "encode",
    "sample-combine-encode",
    "sample-encode-combine",
    "montage",
]


@dataclass(kw_only=True)
class Patches(Options):
    """Options of combinatorial patches."""

    patches: Variant = "off"
    """What predicts. off: whole views. divide-encode-combine: combinations of a view's tiles, encoded one by one
    (Fast-MoCo). divide-combine-encode: tiles joined to rectangles, then encoded. encode: crops of as many pixels, drawn
    one by one. sample-combine-encode: rectangles, drawn one by one. sample-encode-combine: combinations of crops drawn
    one by one. montage: tiles of different images joined to one, encoded, taken apart, combined."""
    divide: int = 2
    """n: tiles per side of a view."""
    combine: int = 2
    """m: tiles in a combination."""
    pairs: int | None = None
    """Combinations per view that are used, each tile equally often (of 2 x 2 tiles in pairs: 2, 4, 6). None: all."""
    combine_by: Literal["mean", "weighted", "beta", "max"] = "mean"
    """mean; weighted: --combine-weight for the first tile; beta: its weight is drawn from Beta(w, w); max: of each
    feature."""
    combine_weight: float = 0.5
    """Weight of the first tile (weighted), or both parameters of the Beta distribution (beta)."""
    combine_after: Literal["backbone", "projector", "predictor"] = "backbone"
    """Where features are combined."""
    target_view: Literal["other", "same"] = "other"
    """Which views a prediction is compared with: the others, or the one that it was made from (an ablation)."""
    extra_crops: int = 0
    """Further whole crops per image that predict all targets (Fast-MoCo's "multi-crop")."""
    extra_size: int | None = None
    """Their side, px. None: --size."""

    READ_IF = {
        **dict.fromkeys(("divide", "combine"), other_than("patches", "off")),
        "combine_weight": one_of("combine_by", "weighted", "beta"),
        "extra_size": above("extra_crops", 0),
    }

    @property
    def num_target_views(self) -> int:
        """Views per image that make targets."""
        return 2

    def validate(self) -> None:
        """Raise UserError for values that make no sense."""
        super().validate()
        at_least(self, 1, "divide", "combine")
        at_least(self, 0, "extra_crops")
        above_zero(self, "combine_weight")
        need(
            self.combine_by != "weighted" or self.combine_weight < 1,
            f"--combine-weight {self.combine_weight}: a share, in (0, 1)",
        )
        halves = self.patches in ("divide-combine-encode", "sample-combine-encode")
        need(
            not halves or (self.divide, self.combine) == (2, 2),
            f"--patches {self.patches} makes rectangles of two tiles of 2 x 2: use --divide 2 --combine 2",
        )
        need(
            self.patches != "encode" or self.combine <= self.divide**2,
            f"--combine {self.combine}: a crop of as many tiles is larger than a view of --divide {self.divide}",
        )
        need(
            self.patches != "encode" or not 2 * self.divide**2 % self.combine,
            f"--combine {self.combine}: the {2 * self.divide**2} tiles of two views make no whole number of such crops",
        )
        need(
            self.num_target_views == 2 or not (self.num_drawn or self.patches == "montage"),
            f"--patches {self.patches} is for methods with two views, here are {self.num_target_views}",
        )
        need(
            self.target_view == "other" or self.owned,
            f"--target-view {self.target_view}: with these --patches and --extra-crops predictions have no view",
        )
        tiles = self.divide**2 * (2 if self.patches in ("sample-encode-combine", "montage") else 1)
        if self.patches in ("divide-encode-combine", "sample-encode-combine", "montage"):
            try:
                subsets(tiles, self.combine, self.pairs)
            except ValueError as error:
                raise UserError(
                    f"--divide {self.divide} --combine {self.combine} --pairs {self.pairs}: {error}"
                ) from error
        else:
            for name, idle in (("pairs", None), ("combine_by", "mean"), ("combine_after", "backbone")):
                value = getattr(self, name)
                need(value == idle, f"{flag(name)} {value}: --patches {self.patches} combines no features")

    @property
    def num_drawn(self) -> int:
        """Crops per image, after the target views, that are drawn one by one, for two target views."""
        tiles = 2 * self.divide**2
        return {
            "encode": tiles // self.combine,
            "sample-combine-encode": tiles // self.combine,
            "sample-encode-combine": tiles,
        }.get(self.patches, 0)

    def check_network(self, net: nn.Module, size: int) -> None:
        """Raise UserError if the options need something that the network does not have."""
        if self.patches == "montage":
            with torch.no_grad():
                feature_map(net.eval(), torch.zeros(2, 3, size, size))
            net.train()

    def target_views(self, views: list[Tensor]) -> list[Tensor]:
        """The views of a batch that targets are made from; what was drawn for predictions comes after them."""
        return views[: len(views) - self.num_drawn - self.extra_crops]

    @property
    def owned(self) -> bool:
        """Whether every prediction is made from one of the target views."""
        return self.num_drawn == self.extra_crops == 0 and self.patches != "montage"


def patch_views(spec: ViewSpec, options: Patches) -> ViewSpec:
    """The target views, and the tiles or crops that the options ask for.

    Crops are drawn like the views, smaller by the same factor in area as in pixels, so that things look as large in
    them (Fast-MoCo names no scales). Raises UserError where the views cannot be divided.
    """
    view, n = spec.views[0], options.divide
    divides = options.patches in ("divide-encode-combine", "divide-combine-encode", "montage", "sample-encode-combine")
    if divides and view.size % n:
        raise UserError(f"--size {view.size} does not divide into {n} tiles (--divide): use a multiple of {n}")

    def crop(share: float) -> tuple:
        low, high = view.scale
        return (dataclasses.replace(view, size=round(view.size * math.sqrt(share)), scale=(low * share, high * share)),)

    extra = crop({"encode": options.combine / n**2, "sample-encode-combine": 1 / n**2}.get(options.patches, 1.0))
    extra *= options.num_drawn
    extra += (dataclasses.replace(view, size=options.extra_size or view.size),) * options.extra_crops
    # The loader cuts all views or none; what is left is cut on the device.
    in_loader = options.patches == "divide-encode-combine" and not extra
    return dataclasses.replace(spec, views=spec.views + extra, divide=n if in_loader else 1)


class Part(NamedTuple):
    """Features of one BatchNorm layout: views of one kind, in the same number of tiles or crops."""

    x_VPBD: Tensor
    combines: bool
    """Whether the tiles are to be combined."""
    owner_V: list[Owner]
    """The target view that each view's predictions are made from; None: none of them."""


class Patched(NamedTuple):
    """Features of what predicts and, where the same network makes the targets, of the whole views."""

    parts: list[Part]
    whole_TBD: Tensor | None = None


def project(g: nn.Module, h: Patched, options: Patches) -> Patched:
    """z = g(h) of every tile or combination. BatchNorm groups: one per view, with all its combinations."""
    parts = []
    for part in h.parts:
        z_VPBD = _rows(g, _combine(part.x_VPBD, "backbone", part.combines, options))
        parts.append(part._replace(x_VPBD=_combine(z_VPBD, "projector", part.combines, options)))
    return Patched(parts)


def predict(q: nn.Module, z: Patched, options: Patches) -> Tensor:
    """p_MBD = q(z) of every combination. BatchNorm groups: one per view, with all its combinations."""
    p = [_combine(_rows(q, part.x_VPBD), "predictor", part.combines, options).flatten(0, 1) for part in z.parts]
    return torch.cat(p)


def num_predictions(z: Part, options: Patches) -> int:
    """Predictions that `predict` makes of each view."""
    if z.combines and options.combine_after == "predictor":
        return len(subsets(z.x_VPBD.shape[1], options.combine, options.pairs))
    return z.x_VPBD.shape[1]


def _rows(net: nn.Module, x_VPBD: Tensor) -> Tensor:
    return in_groups(net, x_VPBD.flatten(0, 2), *x_VPBD.shape[:2]).unflatten(0, x_VPBD.shape[:3])


def _combine(x_VPBD: Tensor, after: str, combines: bool, options: Patches) -> Tensor:
    if not combines or options.combine_after != after:
        return x_VPBD
    x_PND = x_VPBD.transpose(0, 1).flatten(1, 2)
    x_CND = combine(x_PND, options.combine, options.pairs, by=options.combine_by, weight=options.combine_weight)
    return x_CND.unflatten(1, (len(x_VPBD), -1)).transpose(0, 1)


def encode_patches(f: nn.Module, batch: Batch, options: Patches) -> Patched:
    """h = f(x) of whatever predicts. BatchNorm groups: one per view, with all its tiles."""
    n, views = options.divide, options.target_views(batch.views)
    drawn = batch.views[len(views) :]
    crops, extra = drawn[: options.num_drawn], drawn[options.num_drawn :]
    every: list[Owner] = [*range(len(views))]
    nobody: list[Owner] = [None]

    def whole(crops: Sequence[Tensor]) -> Tensor:
        return encode(f, crops)[:, None]

    parts: list[Part] = []
    if options.patches == "off":
        parts.append(Part(whole(views), False, every))
    elif options.patches == "divide-encode-combine":
        tiles = batch.tiles or [divide(x, n) for x in views]
        parts.append(Part(_parts(f, tiles, n * n), True, every))
    elif options.patches == "divide-combine-encode":
        halves = [torch.cat(x.chunk(2, dim=3)) for x in views]  # tiles 0 and 1, tiles 2 and 3
        parts.append(Part(_parts(f, halves, 2), False, every))
    elif options.patches == "encode":
        parts.append(Part(whole(crops), False, nobody * len(crops)))
    elif options.patches == "sample-combine-encode":
        # Lying and upright rectangles in turn; those of one shape go through together.
        lying, upright = ([x.chunk(2, dim=2 + i)[0] for x in crops[i::2]] for i in range(2))
        parts += [Part(whole(some), False, nobody * len(some)) for some in (lying, upright) if some]
    elif options.patches == "sample-encode-combine":
        h_PBD = in_groups(f, crops, 1, len(crops)).unflatten(0, (len(crops), -1))
        parts.append(Part(h_PBD[None], True, nobody))
    elif options.patches == "montage":
        parts.append(Part(torch.cat([_montage(f, x, n) for x in views])[None], True, nobody))
    if extra:
        parts.append(Part(whole(extra), False, nobody * len(extra)))
    return Patched(parts)


def _parts(f: nn.Module, views: Sequence[Tensor], parts: int) -> Tensor:
    """h_VPBD of views [P*B, ...]."""
    return in_groups(f, views, len(views), parts).unflatten(0, (len(views), parts, -1))


def _montage(f: nn.Module, x: Tensor, n: int) -> Tensor:
    """h_PBD of a view's n x n tiles, each encoded among tiles of other images: tile c moves c images on and back."""
    tiles = divide(x, n).unflatten(0, (n * n, -1))
    moved = torch.stack([tile.roll(c, 0) for c, tile in enumerate(tiles)])

    def cells(x: Tensor) -> Tensor:
        """[B, D, n, n]. An odd side, 7 at 224 px, does not part in two: adaptive pooling lets the middle row serve
        both halves."""
        return F.adaptive_avg_pool2d(feature_map(f, x), n)

    cells_PBD = (
        in_groups(f, _join(moved, n), 1, call=cells).permute(3, 2, 0, 1).flatten(0, 1)
    )  # by column, row: as tiles
    return torch.stack([cell.roll(-c, 0) for c, cell in enumerate(cells_PBD)])


def _join(tiles_PBCHW: Tensor, n: int) -> Tensor:
    """The images that `divide` cuts into these tiles."""
    columns = tiles_PBCHW.unflatten(0, (n, n)).permute(2, 3, 1, 4, 0, 5)  # image, channel, row, y, column, x
    return columns.flatten(4, 5).flatten(2, 3).contiguous(memory_format=torch.channels_last)
