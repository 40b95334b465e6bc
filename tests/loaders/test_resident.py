"""Decoded data in memory: what the device form computes, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import photo
from PIL import Image

import loaders
from loaders import UserError
from loaders.backends import resident
from loaders.beton import Reader


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [16, 48, 130])
def test_matrix_products_resize_as_pillow_does(interpolation: str, size: int) -> None:
    rng = np.random.default_rng(0)
    sides = [(50, 70), (97, 64), (200, 31), (1, 1), (64, 64)]
    images = [np.asarray(photo(rng, *s)) for s in sides]
    boxes = np.array([(3, 5, 40, 33), (0, 0, 97, 64), (150, 1, 50, 30), (0, 0, 1, 1), (10, 20, 7, 44)])
    pixels = torch.from_numpy(np.concatenate([i.reshape(-1, 3) for i in images]))
    start = torch.from_numpy(np.cumsum([0] + [h * w for h, w in sides])[:-1])
    width = torch.tensor([w for _, w in sides])
    out = torch.empty(len(sides), size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    resident.resampled_crops(pixels, start, width, list(torch.from_numpy(boxes).T), (128, 96), interpolation, out=out)
    for image, (top, left, height, width), crop in zip(images, boxes.tolist(), out, strict=True):
        region = Image.fromarray(image).crop((left, top, left + width, top + height))
        expected = np.asarray(region.resize((size, size), getattr(Image.Resampling, interpolation.upper())))
        difference = np.abs(crop.permute(1, 2, 0).numpy().astype(int) - expected)
        assert difference.mean() <= 0.5 and difference.max() <= 2


def test_half_precision_is_enough() -> None:
    side = torch.tensor([37, 160])
    exact = resident.resample_weights(side, 64, 160, "bicubic")
    image = torch.randint(0, 256, (2, 160, 160)).float()
    half = (exact.half().float() @ image).half().float() @ exact.half().float().mT
    assert ((exact @ image @ exact.mT) - half).abs().max() < 0.5


def test_views_on_the_host_are_the_cpu_backends_to_the_last_bit(beton: Path) -> None:
    spec = loaders.views.multicrop(40, 24, num_local=2)
    seen = []
    for backend in ("cpu", "resident"):
        with loaders.open(beton, spec, batch_size=8, backend=backend) as loader:
            seen.append([v.clone() for batch in loader.epoch(3) for v in batch.views])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_what_does_not_fit_is_said(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "bytes_free", lambda _device: resident.bytes_needed(Reader(beton)))
    with pytest.raises(UserError, match=r"resident: 48 images decoded are .* use --backend cpu"):
        loaders.open(beton, loaders.views.simsiam(2, 24), batch_size=8, backend="resident")
