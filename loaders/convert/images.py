"""An image file -> what the .beton stores: the unchanged JPEG, or upright 8-bit RGB in a form every reader knows.

A plain JPEG (8 bit, gray or three colours, baseline or progressive, not turned by EXIF) keeps its bytes. Everything
else is decoded by Pillow: CMYK, 16 bit, palettes, other formats. Transparency is composited on white, the first frame
of an animation is taken, ICC profiles are not applied.
"""

from __future__ import annotations

import contextlib
import functools
import io
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from loaders import jpeg
from loaders.beton import MODE_JPEG, MODE_RAW
from loaders.jpeg import JpegHead, jpeg_head

__all__ = ["BadImage", "Stored", "is_image", "store"]

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff")
    + (".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif")
)
# What Pillow may try. Not on the list: formats that start other programs (EPS) or are not pictures (PDF, fonts).
# MPO, several JPEGs in one, opens as JPEG.
_WANTED = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
MAX_PIXELS = 2 * (1 << 30) // 4 // 3  # 178,956,970: more is an attack or a mistake (Pillow's limit for an error)
MAX_JPEG_SIDE = 65500  # libjpeg's limit, below the 65,535 of the record
RAW_SIDE = 64  # lossless sources up to this many pixels a side are stored raw: CIFAR stays exact
LOSSLESS_QUALITY = 95  # with 4:4:4 chroma, for larger ones
# A large JPEG is decoded at 1/2, 1/4 or 1/8 if that leaves at least so many times the pixels a side that --max-side
# asks for; Lanczos does the rest. Against Lanczos from all pixels that is 43-47 dB, where the JPEG written next has
# 30-33 (at 1.5: 39-42), for 2-6 times less work: 12 MP to 256 take 43 ms instead of 196.
DRAFT = 2

SOI, EOI = b"\xff\xd8", b"\xff\xd9"


class BadImage(ValueError):
    """A file that cannot be stored; the message is the reason given in the list of skipped files."""


class Stored(NamedTuple):
    """An image as it goes into the file. `how`: original, smaller (--max-side), converted or raw."""

    blob: bytes | memoryview
    height: int
    width: int
    mode: int
    how: str


def is_image(head: bytes) -> bool:
    """Say if a file that begins with these (at least 16) bytes is in one of the formats of `store`."""
    return (
        head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*"))
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (head[:2] == b"BM" and head[6:10] == b"\0\0\0\0")
        or head[4:12] in (b"ftypavif", b"ftypavis")
        or head.startswith((b"\x00\x00\x00\x0cjP  ", b"\xff\x4f\xff\x51"))
    )


def store(
    data: bytes | memoryview | Image.Image, *, max_side: int | None = None, quality: int = 90, verify: bool = True
) -> Stored:
    """Turn the content of an image file, or decoded pixels, into what is stored. A JPEG that is kept is not copied.

    max_side: pixels; what is longer becomes a JPEG of that side (Lanczos) and `quality`.
    verify: decode each JPEG once. Without it only its markers are read and its end is looked at.
    Raises BadImage with the reason if there is no whole picture in `data`.
    """
    if isinstance(data, Image.Image):
        return _encode(_to_rgb(data), max_side, quality, lossless=True)
    if not data:
        raise BadImage("empty file")
    is_jpeg = data[:2] == SOI
    head = jpeg_head(data) if is_jpeg else None
    if head is not None:
        if head.height * head.width > MAX_PIXELS:
            raise BadImage(f"{head.width} x {head.height} pixels: more than {MAX_PIXELS}, a decompression bomb")
        fits = max_side is None or max(head.height, head.width) <= max_side
        if head.plain and fits and _keep(data, head, verify):
            return Stored(data, head.height, head.width, MODE_JPEG, "original")
    image, smaller = _load(data, max_side)
    return _encode(_to_rgb(image), max_side, quality, lossless=not is_jpeg, smaller=smaller)


def _keep(data: bytes | memoryview, head: JpegHead, verify: bool) -> bool:
    """Say if a plain JPEG may be stored unchanged; raises BadImage if it is not whole.

    Without `verify` its end tells whether it is; what does not end as a JPEG does (bytes behind the end, or cut off) is
    decoded.
    """
    if not verify and (data[-2:] == EOI or bytes(data).rstrip(b"\0").endswith(EOI)):
        return True
    try:
        return jpeg.check(data) == (head.height, head.width)
    except ValueError:
        _load(data)  # the reason; and where Pillow finds none, its pixels can be had
        return False


@functools.cache
def _formats() -> tuple[str, ...]:
    """Names of the wanted formats that this Pillow was built with."""
    Image.init()  # it loads its plug-ins on demand, but not for a list of formats
    return tuple(name for name in _WANTED if name in Image.OPEN)


def _load(data: bytes | memoryview, max_side: int | None = None) -> tuple[Image.Image, bool]:
    """Decode all of the first frame, strictly. A JPEG longer than `max_side` comes out at that side, and True."""
    reduced = None
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
        if max_side is not None and max(image.size) > max_side:
            size = _fitted(image.size, max_side)
            reduced = image.draft(None, (DRAFT * size[0], DRAFT * size[1]))  # None for other formats
        image.load()
    except UnidentifiedImageError:
        raise BadImage("not an image in a known format, or its beginning is damaged") from None
    except Image.DecompressionBombError:
        raise BadImage(f"more than {MAX_PIXELS} pixels, a decompression bomb") from None
    except Exception as e:  # Pillow's plug-ins raise whatever the damage leads to: OSError, SyntaxError, struct.error
        raise BadImage(f"damaged: {' '.join(str(e).split()) or type(e).__name__}") from None
    if reduced is None:
        return image, False
    # The last row and column are partly padding where the scale does not divide the size. So it has to be resized
    # before anything is turned: counting the padding in shifts the picture (31 dB where it is 44 without).
    return image.resize(size, Image.Resampling.LANCZOS, box=reduced[1]), True


def _fitted(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    """Width and height, in their proportion, with `max_side` for the longer one."""
    width, height = (max(1, round(side * max_side / max(size))) for side in size)
    return width, height


def _to_rgb(image: Image.Image) -> Image.Image:
    """Upright 8-bit RGB."""
    with contextlib.suppress(Exception):  # a damaged EXIF block says nothing about the pixels
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return _from_integers(image)
    if image.mode == "F":
        raise BadImage("floating-point pixels, whose range is not known; store them as 8 or 16 bit")
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _from_integers(image: Image.Image) -> Image.Image:
    """16-bit gray: 65,535 becomes 255 (a step of 257), where Pillow's own conversion clips everything above 255."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise BadImage("32-bit integer pixels, whose range is not known; store them as 8 or 16 bit")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")


def _encode(image: Image.Image, max_side: int | None, quality: int, *, lossless: bool, smaller: bool = False) -> Stored:
    """RGB pixels, perhaps `smaller` already -> smaller, raw (tiny and never compressed), or a JPEG hardly different."""
    if max_side is not None and max(image.size) > max_side:
        image, smaller = image.resize(_fitted(image.size, max_side), Image.Resampling.LANCZOS), True
    width, height = image.size
    if lossless and not smaller and max(image.size) <= RAW_SIDE:
        return Stored(image.tobytes(), height, width, MODE_RAW, "raw")
    if max(image.size) > MAX_JPEG_SIDE:
        raise BadImage(f"{width} x {height} pixels: no JPEG has sides above {MAX_JPEG_SIDE}; --max-side helps")
    out = io.BytesIO()
    if smaller:
        image.save(out, "JPEG", quality=quality)
    else:
        image.save(out, "JPEG", quality=LOSSLESS_QUALITY, subsampling=0)
    return Stored(out.getvalue(), height, width, MODE_JPEG, "smaller" if smaller else "converted")
