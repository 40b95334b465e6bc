"""A batch as the caller gets it, and the memory in which it is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from loaders.backends.base import Pending
    from loaders.job import Job


Views = tuple[list[torch.Tensor], list[torch.Tensor] | None]  # K views, and their tiles (None without)


@dataclass
class Batch:
    """B images as K views (a list, because local crops are smaller), normalised, channels last, on the device.

    views   K tensors [B, 3, S_k, S_k]
    tiles   with `divide = n`: K tensors [n*n*B, 3, S_k/n, S_k/n], tile-major, tiles in column-major order; else None
    index   [B] sample ids, int64, on the host
    label   [B] labels, int64, on the host (never used in training)
    """

    views: list[torch.Tensor]
    tiles: list[torch.Tensor] | None
    index: torch.Tensor
    label: torch.Tensor


@dataclass
class Slot:
    """Memory for one batch, allocated when a loader is opened, and the batch that is in it."""

    crops: list[torch.Tensor]
    """uint8, on the backend's device; pinned if they will be copied to a GPU; none if the backend has its own."""
    views: list[torch.Tensor]
    """Normalised, where they are made on the host; else none."""
    tiles: list[torch.Tensor] | None = None
    """Tiles of the views, if the method asks for tiles."""
    job: Job = field(init=False)
    """The batch while it is made; keeps a backend's own crops alive until the device has used them."""
    work: Pending = field(init=False)
    """The backend's work on the job."""
    batch: Batch = field(init=False)
    """The batch for the caller."""
    event: torch.cuda.Event | None = field(default=None, init=False)
    """The point on the producer's stream from which the batch may be used."""
    used: tuple[torch.cuda.Event, torch.cuda.Event] | None = field(default=None, init=False)
    """Begin and end of the device's work on the crops."""

    def filled(self) -> Views:
        """The views and tiles of as many images as the job has."""
        num = len(self.job.index_B)
        tiles = self.tiles and [t[: len(t) // len(v) * num] for t, v in zip(self.tiles, self.views, strict=True)]
        return [v[:num] for v in self.views], tiles


def empty_images(
    num: int, size: int, dtype: torch.dtype, device: torch.device | None = None, *, pin: bool = False
) -> torch.Tensor:
    """Memory for images [num, 3, size, size], channels last."""
    flat = torch.empty(num, size, size, 3, dtype=dtype, device=device, pin_memory=pin)
    return flat.permute(0, 3, 1, 2)
