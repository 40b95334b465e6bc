"""The CPU backend against Pillow: same boxes, same pixels."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import jpeg_bytes, photo
from PIL import Image

import loaders
from loaders.backends import cpu
from loaders.beton import Reader, Sample, Writer
from loaders.draw import draw

KINDS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True},
    "quality 40": {"quality": 40},
}
SIZES = [(64, 80), (233, 311), (1, 1), (3, 900), (900, 3), (1500, 2000)]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    """One sample of every kind: chroma subsamplings, progressive, gray, tiny, huge, extreme aspect, raw."""
    rng = np.random.default_rng(0)
    blobs = [jpeg_bytes(photo(rng, 97, 131), **options) for options in KINDS.values()]
    blobs += [jpeg_bytes(photo(rng, 97, 131).convert("L"))]
    blobs += [jpeg_bytes(photo(rng, *size)) for size in SIZES]
    path = tmp_path_factory.mktemp("zoo") / "zoo.beton"
    raw = np.asarray(photo(rng, 32, 40))
    with Writer(path, len(blobs) + 1) as writer:
        for blob in blobs:
            width, height = Image.open(io.BytesIO(blob)).size
            writer.add(blob, height, width, 0)
        writer.add(raw.tobytes(), 32, 40, 0, mode=1)
    return path, [*blobs, raw.tobytes()]


def pil_crops(path: Path, spec: loaders.ViewSpec, seed: int, epoch: int) -> list[list[np.ndarray]]:
    """Crops [sample][view] as Pillow makes them from the same boxes."""
    reader, result = Reader(path), []
    index = np.arange(len(reader))
    draws = draw(spec, seed=seed, epoch=epoch, index_B=index, height_B=reader.height, width_B=reader.width)
    for i in index:
        sample = reader[int(i)]
        if sample.mode == 1:
            image = Image.fromarray(np.array(sample.jpeg).reshape(sample.height, sample.width, 3))
        else:
            image = Image.open(io.BytesIO(bytes(sample.jpeg))).convert("RGB")
        crops = []
        for view, d in zip(spec.views, draws, strict=True):
            top, left, height, width = d.box_B4[i].tolist()
            kind = getattr(Image.Resampling, view.interpolation.upper())
            region = image.crop((left, top, left + width, top + height))
            crops.append(np.asarray(region.resize((view.size, view.size), kind)))
        result.append(crops)
    return result


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crops_are_pillows(zoo, interpolation: str) -> None:
    path, blobs = zoo
    spec = loaders.views.simsiam(3, 48, interpolation=interpolation)
    plain = {"jitter_p": 0, "gray_p": 0, "blur_p": 0, "flip_p": 0}
    spec = loaders.ViewSpec(tuple(replace(v, **plain) for v in spec.views))
    expected = pil_crops(path, spec, seed=3, epoch=2)
    mean, std = torch.tensor(spec.mean)[:, None, None], torch.tensor(spec.std)[:, None, None]
    with loaders.open(path, spec, batch_size=len(blobs), order="sequential", seed=3) as loader:
        (batch,) = loader.epoch(2)
        for k, view in enumerate(batch.views):
            for i in range(len(blobs)):
                pixels = ((view[i] * std + mean) * 255).permute(1, 2, 0).numpy()
                difference = np.abs(pixels - expected[i][k]).mean()
                assert difference <= 0.5, f"sample {i} view {k}: {difference:.2f}/255 from Pillow"


def replace(view: loaders.views.View, **changes: object) -> loaders.views.View:
    import dataclasses

    return dataclasses.replace(view, **changes)


def test_decoding_errors_say_what() -> None:
    rng = np.random.default_rng(0)
    blob = np.frombuffer(jpeg_bytes(photo(rng, 20, 30)), np.uint8)
    assert cpu.decode(Sample(blob, 20, 30, 0)).shape == (3, 20, 30)
    with pytest.raises(ValueError, match=r"decodes to \(20, 30\)"):
        cpu.decode(Sample(blob, 30, 20, 0))
    with pytest.raises(ValueError, match=r"(?i)jpeg|decode"):
        cpu.decode(Sample(np.zeros(100, np.uint8), 20, 30, 0))
    with pytest.raises(ValueError, match="raw bytes"):
        cpu.decode(Sample(np.zeros(100, np.uint8), 20, 30, 0, mode=1))
