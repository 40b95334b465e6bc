"""The work for one batch, from sample ids to crops and views."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch

from loaders.augment.rows import Operations, augment_rows, operations
from loaders.dataset import Dataset
from loaders.draw import Draws, draw
from loaders.errors import UserError
from loaders.stats import Stats
from loaders.views import ViewSpec

ON_BAD_SAMPLE = ("raise", "skip")
_MAX_REPLACEMENTS = 100  # in a row: more than that is a broken file, not a broken sample


class BadSample(UserError):
    """A stored image that does not decode: sample `index` of the file `path`."""

    def __init__(self, path: str | os.PathLike, index: int, reason: str):
        self.index = index
        super().__init__(
            f"sample {index} of {path} does not decode: {reason}; convert again without --no-verify, or train with "
            "--on-bad-sample skip"
        )


@dataclass
class Job:
    """A batch for a backend: the samples, their draws, and the memory for the crops.

    B images, K views. `crops` are K uint8 tensors [B, 3, S_k, S_k], channels last, on the backend's device.
    Where augmentation runs on the host, its results go to `views` (and `tiles`, see `augment.divide`).
    """

    reader: Dataset
    spec: ViewSpec
    index_B: np.ndarray
    crops: Sequence[torch.Tensor]
    stats: Stats
    seed: int = 0
    epoch: int = 0
    on_bad_sample: str = "raise"
    ready_made: bool = False
    """The views are there already: nothing is drawn."""
    views: list[torch.Tensor] = field(default_factory=list)
    tiles: list[torch.Tensor] | None = None

    def __post_init__(self) -> None:
        self.index_B = np.array(self.index_B, dtype=np.int64)  # a broken sample may be replaced in it
        self.label_B = np.array(self.reader.label[self.index_B], dtype=np.int64)
        self.crops = [c[: len(self.index_B)] for c in self.crops]
        self.draws = [] if self.ready_made else self._draw(self.index_B)
        self._operations: list[list[Operations]] | None = None  # for each view

    def _draw(self, index_B: np.ndarray) -> list[Draws]:
        sides = {"height_B": self.reader.height[index_B], "width_B": self.reader.width[index_B]}
        return draw(self.spec, seed=self.seed, epoch=self.epoch, index_B=index_B, **sides)

    def augment_rows(self, rows: range) -> None:
        """Make views and tiles of finished rows of crops; do nothing where augmentation runs on the device."""
        if not self.views:
            return
        todo = self._operations or self.prepare()
        for k, (view, out) in enumerate(zip(self.spec.views, self.views, strict=True)):
            tiles = self.tiles[k] if self.tiles else None
            augment_rows(self.crops[k], todo[k], view, self.spec.mean, self.spec.std, rows, out, tiles)

    def prepare(self) -> list[list[Operations]]:
        """Work out what augmentation does to each row, before threads need it; again after a replacement."""
        self._operations = [operations(draws, view) for draws, view in zip(self.draws, self.spec.views, strict=True)]
        return self._operations

    def replace(self, row: int, reason: str) -> None:
        """Put the next sample of the data, with its own draws, in the place of a broken one, or raise BadSample.

        The batch keeps its size, so that compiled code and BatchNorm see what they expect, and the outcome depends
        on the broken sample alone, not on timing.
        """
        index = int(self.index_B[row])
        bad = BadSample(*self.reader.locate(index), reason)
        if self.on_bad_sample == "raise":
            raise bad
        self.stats.add(replaced=1)
        if self.stats.replaced >= _MAX_REPLACEMENTS and self.stats.replaced >= self.stats.images:
            raise UserError(f"more broken than whole samples in {self.reader.path}, the last: {bad}") from bad
        warnings.warn(f"replaced by the next sample: {bad}", stacklevel=2)
        index = (index + 1) % len(self.reader)
        self.index_B[row] = index
        self.label_B[row] = self.reader.label[index]
        for ours, theirs in zip(self.draws, self._draw(np.array([index])), strict=True):
            for name in (f.name for f in fields(Draws)):
                getattr(ours, name)[row] = getattr(theirs, name)[0]
        self._operations = None
