"""One batch on its way through a backend."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Sequence

import numpy as np
import torch

from loaders.augment import Step, augment_rows, plan
from loaders.beton import Reader
from loaders.dataset import Readers
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


@dataclasses.dataclass
class Job:
    """What a backend needs for one batch: which samples, which crops of them, and where to put the pixels.

    B images, K views. `crops` are K uint8 tensors [B, 3, S_k, S_k], channels last, on the backend's device.
    Where augmentation runs on the host, `views` (and `tiles`, see `augment.divide`) are where its results go.
    """

    reader: Reader | Readers
    spec: ViewSpec
    seed: int
    epoch: int
    index_B: np.ndarray
    label_B: np.ndarray
    draws: list[Draws]
    crops: list[torch.Tensor]
    stats: Stats
    on_bad_sample: str = "raise"
    views: list[torch.Tensor] | None = None
    tiles: list[torch.Tensor] | None = None
    plans: list[list[Step]] | None = None  # for each view

    @classmethod
    def drawn(
        cls,
        reader: Reader | Readers,
        spec: ViewSpec,
        index_B: np.ndarray,
        crops: Sequence[torch.Tensor],
        stats: Stats,
        *,
        seed: int = 0,
        epoch: int = 0,
        on_bad_sample: str = "raise",
    ) -> Job:
        """The job for these samples: their labels and draws, and as much of `crops` as they need."""
        index_B = np.array(index_B, dtype=np.int64)  # a broken sample may be replaced in it
        return cls(
            reader=reader,
            spec=spec,
            seed=seed,
            epoch=epoch,
            index_B=index_B,
            label_B=np.array(reader.label[index_B], dtype=np.int64),
            draws=_draw(reader, spec, index_B, seed, epoch),
            crops=[c[: len(index_B)] for c in crops],
            stats=stats,
            on_bad_sample=on_bad_sample,
        )

    def augment_rows(self, rows: range) -> None:
        """Finished rows of crops -> views and tiles; nothing where augmentation runs on the device."""
        if self.views is None:
            return
        plans = self.plans or self.plan()
        for k, (view, out) in enumerate(zip(self.spec.views, self.views, strict=True)):
            tiles = self.tiles[k] if self.tiles else None
            augment_rows(self.crops[k], plans[k], view, self.spec.mean, self.spec.std, rows, out, tiles)

    def plan(self) -> list[list[Step]]:
        """What augmentation does to each row; to be asked for before threads need it, and anew after a replacement."""
        self.plans = [plan(draws, view) for draws, view in zip(self.draws, self.spec.views, strict=True)]
        return self.plans

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
        new = _draw(self.reader, self.spec, np.array([index]), self.seed, self.epoch)
        for ours, theirs in zip(self.draws, new, strict=True):
            for field in dataclasses.fields(Draws):
                getattr(ours, field.name)[row] = getattr(theirs, field.name)[0]
        self.plans = None


def _draw(reader: Reader | Readers, spec: ViewSpec, index_B: np.ndarray, seed: int, epoch: int) -> list[Draws]:
    sides = {"height_B": reader.height[index_B], "width_B": reader.width[index_B]}
    return draw(spec, seed=seed, epoch=epoch, index_B=index_B, **sides)


def empty_images(
    num: int, size: int, dtype: torch.dtype, device: torch.device | None = None, *, pin: bool = False
) -> torch.Tensor:
    """Memory for images [num, 3, size, size], channels last."""
    flat = torch.empty(num, size, size, 3, dtype=dtype, device=device, pin_memory=pin)
    return flat.permute(0, 3, 1, 2)
