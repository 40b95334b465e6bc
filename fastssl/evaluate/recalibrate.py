"""BatchNorm statistics for the images that a network is evaluated on.

A network trained on small crops or tiles carries their running statistics; on whole images of another size the outputs
of its layers are distributed differently (Touvron et al., "Fixing the train-test resolution discrepancy", NeurIPS 2019,
section 3). Recomputing the statistics needs forward passes only, and no weight changes.
"""

from __future__ import annotations

import contextlib
import copy

import numpy as np
import torch
from torch import nn

from fastssl.evaluate.features import centre_crops, spread
from fastssl.networks.batch_norm import running_norms, ungroup_batch_norm
from loaders.beton import Reader
from loaders.dataset import Readers
from loaders.errors import UserError

NAME = "weights-recalibrated.safetensors"


@torch.no_grad()
def recalibrated(
    backbone: nn.Module,
    reader: Reader | Readers,
    *,
    size: int,
    device: torch.device,
    images: int,
    amp_dtype: torch.dtype | None = None,
    fraction: float = 0.875,
    batch_size: int = 128,
    workers: int | None = None,
) -> nn.Module:
    """A copy of `backbone`, in eval mode, with BatchNorm statistics of `images` images of a file.

    The images are evenly spread over the file and cropped as `evaluate.features.extract` does (`fraction`, `size`).
    BatchNorm's mean and variance are the plain averages over batches of about `batch_size`, all of one size; all other
    layers are in eval mode. `backbone` itself, its modes and the random numbers do not change. A backbone without
    BatchNorm is returned itself. Raises UserError for fewer than two images.
    """
    if not running_norms(backbone):
        return backbone
    images = min(images, len(reader))
    if images < 2:
        raise UserError(f"BatchNorm's statistics cannot be had from {images} images: raise --recalibrate-bn (10000)")
    net = ungroup_batch_norm(copy.deepcopy(backbone)).eval()  # no waiting for processes that are not here, no groups
    norms = running_norms(net)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average of all batches, each weighing the same
        norm.train()
    num = -(-images // batch_size)
    batch_size = images // num
    ids = spread(len(reader), num * batch_size)
    # Files are often sorted by class: every batch takes images from the whole file.
    ids = np.concatenate([ids[i::num] for i in range(num)])
    batches = centre_crops(
        reader, size=size, device=device, fraction=fraction, batch_size=batch_size, ids=ids, workers=workers
    )
    for batch in batches:
        with torch.autocast(device.type, amp_dtype) if amp_dtype else contextlib.nullcontext():
            net(batch.views[0])
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return net.eval()
