"""Features of every image of a file, one centre crop each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import loaders
from loaders.beton import Reader
from loaders.dataset import Readers


def spread(num: int, limit: int | None) -> np.ndarray:
    """Ids of `limit` images out of `num`, evenly spread over the file; all ids if `limit` is None or at least `num`."""
    return np.arange(num) if limit is None or limit >= num else (np.arange(limit) * num) // limit


def centre_crops(
    reader: Reader | Readers,
    *,
    size: int,
    device: torch.device,
    fraction: float = 0.875,
    batch_size: int = 128,
    ids: np.ndarray | None = None,
    workers: int | None = None,
) -> Iterator[loaders.Batch]:
    """Batches of a file's images, or of those in `ids`, in that order: one view of `size` px each.

    The view is the centre square of `fraction` of the short side, resized to `size` px: at 224, the usual "short side
    256, centre 224" in one resampling.
    """
    spec = loaders.views.evaluation(size, fraction)
    with loaders.Loader(
        reader, spec, batch_size=batch_size, device=device, order="sequential", workers=workers, subset=ids
    ) as loader:
        yield from loader.epoch()


@torch.no_grad()
def extract(
    backbone: nn.Module,
    reader: Reader | Readers,
    *,
    size: int,
    device: torch.device,
    fraction: float = 0.875,
    batch_size: int = 128,
    amp_dtype: torch.dtype | None = None,
    limit: int | None = None,
    workers: int | None = None,
) -> tuple[Tensor, Tensor]:
    """L2-normalised fp32 features [N, D] and labels [N] of a file, in file order, on `device`.

    The views are those of `centre_crops`. The backbone is put in eval mode and back. `limit` takes that many images,
    evenly spread over the file.
    """
    ids = spread(len(reader), limit)
    batches = centre_crops(
        reader,
        size=size,
        device=device,
        fraction=fraction,
        batch_size=batch_size,
        ids=None if len(ids) == len(reader) else ids,
        workers=workers,
    )
    was_training = backbone.training
    backbone.eval()
    features, labels = [], []
    try:
        for batch in batches:
            with torch.autocast(device.type, amp_dtype) if amp_dtype else contextlib.nullcontext():
                out = backbone(batch.views[0])
            features.append(F.normalize(out.float(), dim=1))
            labels.append(batch.label)
    finally:
        backbone.train(was_training)
    return torch.cat(features), torch.cat(labels).to(device)
