"""Features of every image of a file, one centre crop each."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import loaders
from loaders.beton import Reader


@torch.no_grad()
def extract(
    backbone: nn.Module,
    reader: Reader,
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

    The view is the centre square of `fraction` of the short side, resized to `size` px: at 224, the usual "short side
    256, centre 224" in one resampling. The backbone is put in eval mode and back. `limit` takes that many images,
    evenly spread over the file.
    """
    num = len(reader)
    keep = torch.arange(num) if limit is None or limit >= num else (torch.arange(limit) * num) // limit
    was_training = backbone.training
    backbone.eval()
    features, labels = [], []
    subset = None if len(keep) == num else keep.numpy()
    spec = loaders.views.evaluation(size, fraction)
    options = {"batch_size": batch_size, "device": device, "order": "sequential", "workers": workers, "subset": subset}
    try:
        with loaders.Loader(reader, spec, **options) as loader:
            for batch in loader.epoch():
                with torch.autocast(device.type, amp_dtype) if amp_dtype else contextlib.nullcontext():
                    out = backbone(batch.views[0])
                features.append(F.normalize(out.float(), dim=1))
                labels.append(batch.label)
    finally:
        backbone.train(was_training)
    return torch.cat(features), torch.cat(labels).to(device)
