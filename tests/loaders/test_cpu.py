"""The CPU backend's decoder; what it has in common with the other backends is in test_backends.py."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from conftest import jpeg_bytes, photo
from PIL import Image
from test_backends import KINDS as backends_kinds

import loaders
from loaders import jpeg
from loaders.backends import cpu
from loaders.beton import MODE_RAW, Sample

KINDS = backends_kinds | {"RGB, not YCbCr": {"keep_rgb": True}}


def picture(height: int = 97, width: int = 131) -> Image.Image:
    return photo(np.random.default_rng(0), height, width)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(97, 131), (1, 1), (8, 300)])
def test_pixels_are_pillows_to_the_last_bit(kind: str, shape: tuple[int, int]) -> None:
    blob = jpeg_bytes(picture(*shape), **KINDS[kind])
    assert np.array_equal(jpeg.decode(blob), np.asarray(Image.open(io.BytesIO(blob))))


def test_gray_comes_as_three_channels() -> None:
    blob = jpeg_bytes(picture().convert("L"))
    expected = np.asarray(Image.open(io.BytesIO(blob)))[:, :, None]
    assert np.array_equal(jpeg.decode(blob), expected.repeat(3, axis=2))
    assert jpeg.check(blob) == expected.shape[:2] == (97, 131)


def test_exif_does_not_turn_the_picture() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert jpeg.decode(jpeg_bytes(picture(), exif=exif)).shape == (97, 131, 3)


def test_read_only_memory_is_decoded_where_it_lies() -> None:
    blob = np.frombuffer(jpeg_bytes(picture()), np.uint8)
    assert not blob.flags.writeable
    assert np.array_equal(jpeg.decode(blob), jpeg.decode(blob.tobytes()))


def test_what_libjpeg_only_warns_of_is_no_error() -> None:
    """Some of ImageNet's files are like that."""
    blob = jpeg_bytes(picture())
    with_stray_bytes = blob[:-2] + b"\x12\x34" + blob[-2:]
    assert np.array_equal(jpeg.decode(with_stray_bytes), jpeg.decode(blob))


@pytest.mark.parametrize("blob", [b"", bytes(100), b"\xff\xd8\xff\xd9", jpeg_bytes(picture())[:300]])
def test_what_is_no_jpeg_is_an_error(blob: bytes) -> None:
    for read in (jpeg.decode, jpeg.check):
        with pytest.raises(ValueError, match=r"(?i)jpeg"):
            read(blob)


@pytest.mark.parametrize("missing", [3, 100, 3000])
def test_a_truncated_jpeg_is_an_error(missing: int) -> None:
    for read in (jpeg.decode, jpeg.check):
        with pytest.raises(ValueError, match=r"(?i)premature end"):
            read(jpeg_bytes(picture())[:-missing])


def test_decoding_errors_say_what() -> None:
    blob = np.frombuffer(jpeg_bytes(picture(20, 30)), np.uint8)
    assert cpu.decode(Sample(blob, 20, 30, 0)).shape == (20, 30, 3)
    with pytest.raises(ValueError, match=r"decodes to \(20, 30\), the file says \(30, 20\)"):
        cpu.decode(Sample(blob, 30, 20, 0))
    with pytest.raises(ValueError, match=r"(?i)jpeg"):
        cpu.decode(Sample(np.zeros(100, np.uint8), 20, 30, 0))
    with pytest.raises(ValueError, match="100 raw bytes, expected 20 x 30 x 3"):
        cpu.decode(Sample(np.zeros(100, np.uint8), 20, 30, 0, MODE_RAW))


def test_each_image_is_decoded_once(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    monkeypatch.setattr(cpu.jpeg, "decode", lambda blob, decode=jpeg.decode: decoded.append(len(blob)) or decode(blob))
    with loaders.open(beton, loaders.views.simsiam(4, 32), batch_size=8, backend="cpu") as loader:
        assert sum(len(batch.index) for batch in loader.epoch()) == 48
    assert sorted(decoded) == sorted(loader.reader.size.tolist())
