"""Small data for all tests: generated, deterministic, no network."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import TinyResNet

from loaders.beton import Reader, Writer

NUM_CLASSES = 4

# Tensors here are small: more threads gain little, and on a busy machine they wait for each other
# ten times longer than they compute. Programs that tests start follow.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def photo(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Something like a photograph: smooth structure at several scales, some noise, strong colours."""
    pixels = np.zeros((height, width, 3))
    for side in (3, 7, 15):
        coarse = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        pixels += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=float)
    pixels = pixels / 3 + rng.normal(0, 4, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def jpeg_bytes(image: Image.Image, **options: object) -> bytes:
    """The image as a JPEG stream."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **({"quality": 90} | options))
    return buffer.getvalue()


def write_beton(path: Path, num: int, *, seed: int = 0, sides: tuple[int, int] = (40, 80)) -> Path:
    """A .beton file of `num` random photographs with labels 0..3."""
    rng = np.random.default_rng(seed)
    with Writer(path, num) as writer:
        for i in range(num):
            height, width = rng.integers(*sides, 2).tolist()
            writer.add(jpeg_bytes(photo(rng, height, width)), height, width, i % NUM_CLASSES)
    return path


def overwrite(path: Path, *indices: int, content: bytes | None = None) -> None:
    """Put `content`, zeros unless given, in the place of stored blobs."""
    with Reader(path) as reader:
        places = [(int(reader.pointer[i]), int(reader.size[i])) for i in indices]
    with open(path, "r+b") as file:
        for start, size in places:
            assert content is None or len(content) <= size
            file.seek(start)
            file.write(bytes(size) if content is None else content)


@pytest.fixture(scope="session")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 JPEGs of mixed sizes."""
    return write_beton(tmp_path_factory.mktemp("data") / "train.beton", 48)


@pytest.fixture(scope="session")
def val_beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 other JPEGs."""
    return write_beton(tmp_path_factory.mktemp("data") / "val.beton", 20, seed=1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny network in place of every backbone."""
    monkeypatch.setattr("fastssl.training.build.backbone", lambda *_, **__: (TinyResNet(), TinyResNet.width))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU without one."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
