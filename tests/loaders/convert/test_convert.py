"""fastssl-convert from the command line: what is in the file afterwards, and what is left when it fails."""

import csv
import errno
import io
import itertools
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torchvision
from PIL import Image, ImageOps

import loaders
from loaders import beton, draw
from loaders.beton import MODE_JPEG, MODE_RAW, Reader
from loaders.convert import command as convert
from loaders.convert import images
from loaders.dataset import open_data


def smooth(height=60, width=80, seed=0, bands=3):
    """A picture that JPEG hardly changes, different in every corner."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (3, 4, bands), dtype=np.uint8).squeeze()
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encode(image, form="JPEG", **options):
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def put(folder, contents):
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return str(folder)


def run(capsys, *arguments):
    """Exit status, stdout, stderr of the command."""
    status = convert.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def convert_one(tmp_path, capsys, content, *options, name="x.jpg"):
    """Convert one image file -> its sample, with the reader's checks."""
    shutil.rmtree(tmp_path / "one", ignore_errors=True)
    src = put(tmp_path / "one", {name: content})
    status, _, err = run(capsys, src, tmp_path / "one.beton", "--overwrite", *options)
    assert status == 0, err
    reader = Reader(tmp_path / "one.beton")
    assert len(reader) == 1
    return reader[0]


def pixels(sample):
    """What any reader makes of a sample: no EXIF, no CMYK."""
    if sample.mode == MODE_RAW:
        return sample.jpeg.reshape(sample.height, sample.width, 3)
    image = Image.open(io.BytesIO(sample.jpeg))
    assert image.format == "JPEG" and image.mode == "RGB" and image.size == (sample.width, sample.height)
    assert image.getexif().get(0x0112, 1) == 1
    return np.asarray(image)


def assert_close(sample, want, limit=2.0):
    got = pixels(sample)
    want = np.asarray(want.convert("RGB") if isinstance(want, Image.Image) else want)
    assert got.shape == want.shape
    assert np.abs(got.astype(int) - want).mean() < limit


@pytest.fixture
def folder(tmp_path):
    """Two classes, 30 JPEGs of different sizes."""
    names = [f"{'cat' if i % 3 else 'dog'}/{i:02d}.jpg" for i in range(30)]
    return put(tmp_path / "src", {name: encode(smooth(40 + i, 90 - i, seed=i)) for i, name in enumerate(names)})


# What is kept


def test_jpegs_keep_their_bytes(tmp_path, capsys, folder):
    out = tmp_path / "o.beton"
    status, table, err = run(capsys, folder, out)
    assert status == 0 and err == ""
    files = sorted(Path(folder).rglob("*.jpg"))
    reader = Reader(out)
    assert [bytes(s.jpeg) for s in reader] == [f.read_bytes() for f in files]
    assert [reader.classes[s.label] for s in reader] == [f.parent.name for f in files]
    assert [(s.width, s.height) for s in reader] == [Image.open(f).size for f in files]
    assert "30" in table and "original bytes" in table and "images/s" in table
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.beton", "o.json", "src"]


def test_summary_beside_the_file(tmp_path, capsys, folder):
    run(capsys, folder, tmp_path / "o.beton", "--limit", 9, "--workers", 2)
    content = json.loads((tmp_path / "o.json").read_text())
    assert content["classes"] == ["cat", "dog"] and content["images"] == 9 and sum(content["counts"]) == 9
    assert min(content["counts"]) > 0  # --limit takes from all classes
    assert content["source"] == folder and content["options"]["limit"] == 9 and content["stored"] == {"original": 9}
    assert content["bytes"] == (tmp_path / "o.beton").stat().st_size and content["skipped"] == 0
    assert content["versions"]["fastssl"] == loaders.__version__
    assert content["versions"]["torch"] and content["seconds"] > 0


def test_any_number_of_workers_writes_the_same_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(convert, "CHUNK_IMAGES", 5)  # many chunks, so that their memory is used again,
    monkeypatch.setattr(convert, "CHUNK_BYTES", 6000)  # and some that do not fit
    contents = {f"{i % 4}/{i:03d}.jpg": encode(smooth(30 + i % 7, 50, seed=i)) for i in range(70)}
    contents |= {f"{i % 4}/{i:03d}.png": encode(smooth(70, 80, seed=i), "PNG") for i in range(70, 90)}
    contents |= {f"1/{i:03d}.jpg": b"broken" for i in range(90, 95)}
    src = put(tmp_path / "src", contents)
    files = []
    for workers in (1, 4):
        status, _, err = run(capsys, src, tmp_path / f"{workers}.beton", "--workers", workers, "--max-side", 75)
        assert status == 0, err
        files.append((tmp_path / f"{workers}.beton").read_bytes())
        files.append((tmp_path / f"{workers}.skipped.csv").read_bytes())
    assert files[0] == files[2] and files[1] == files[3]


@pytest.mark.parametrize("verify", ["--verify", "--no-verify"])
@pytest.mark.parametrize(
    ("options", "tail"),
    [
        ({}, b""),
        ({"progressive": True}, b""),
        ({"subsampling": 0}, b""),
        ({"restart_marker_blocks": 2}, b""),
        ({"optimize": True, "comment": b"\xff\xd9 an end inside a comment"}, b""),
        ({"icc_profile": b"p" * 70_000}, b""),
        ({"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"}, b""),
        ({}, b"\0" * 100),
        ({}, b"trailing text"),
        ({}, b"\0\0x"),
        ({}, encode(smooth(8, 8))),
    ],
    ids=lambda o: "+".join(o) if isinstance(o, dict) else str(o[:9]),
)
@pytest.mark.parametrize(("bands", "name"), [(3, "x.jpg"), (1, "x.jpg"), (3, "x.png")])
def test_plain_jpegs_are_original(tmp_path, capsys, options, tail, bands, name, verify):
    """Whatever they are called, and whatever comes behind their end."""
    content = encode(smooth(71, 33, bands=bands), **options) + tail
    sample = convert_one(tmp_path, capsys, content, verify, name=name)
    assert bytes(sample.jpeg) == content and (sample.height, sample.width) == (71, 33)


# Order and parts


def pack(tmp_path, folder):
    """The folder and archives of it, listed in the same order."""
    files = sorted(Path(folder).rglob("*.jpg"))
    for name, mode in (("x.tar", "w"), ("x.tgz", "w:gz")):
        with tarfile.open(tmp_path / name, mode) as tar:
            for file in files:
                tar.add(file, file.relative_to(folder))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for file in files:
            archive.write(file, file.relative_to(folder))
    return [folder, *(str(tmp_path / name) for name in ("x.tar", "x.tgz", "x.zip"))]


def read(path):
    """(blob, class) of every sample."""
    reader = Reader(path)
    return [(bytes(s.jpeg), reader.classes[s.label]) for s in reader]


def test_shuffle(tmp_path, capsys, folder):
    files = sorted(Path(folder).rglob("*.jpg"))
    want = [files[i] for i in draw.permutation(30, seed=7, epoch=0, stream=convert.SHUFFLE_STREAM)]
    contents = set()
    for number, src in enumerate(pack(tmp_path, folder)):
        for workers in (1, 3):
            out = tmp_path / f"{number}{workers}.beton"
            status, table, err = run(capsys, src, out, "--shuffle", "--seed", 7, "--workers", workers)
            assert status == 0, err
            assert read(out) == [(file.read_bytes(), file.parent.name) for file in want]
            contents.add(out.read_bytes())
    assert len(contents) == 1
    assert "shuffled with seed 7" in table
    content = json.loads((tmp_path / "01.json").read_text())
    assert content["order"] == "shuffled with seed 7" and content["options"]["shuffle"] is True
    run(capsys, folder, tmp_path / "other.beton", "--shuffle", "--seed", 8)
    assert sorted(read(tmp_path / "other.beton")) == sorted(read(tmp_path / "01.beton")) != read(tmp_path / "01.beton")
    assert read(tmp_path / "other.beton") != read(tmp_path / "01.beton")


def test_the_shuffled_order_is_for_ever(tmp_path, capsys):
    src = put(tmp_path / "src", {f"{i}.jpg": encode(Image.new("RGB", (10 + i, 9))) for i in range(8)})
    assert run(capsys, src, tmp_path / "o.beton", "--shuffle")[0] == 0
    assert (Reader(tmp_path / "o.beton").width - 10).tolist() == [6, 0, 5, 4, 2, 1, 7, 3]


def test_shuffle_of_generated_pictures_and_data_sets(tmp_path, capsys, monkeypatch):
    class Pixels:
        classes = ["a", "b"]

        def __init__(self, root, train=True):
            del root, train

        def __len__(self):
            return 20

        def __getitem__(self, i):
            return Image.new("RGB", (4, 3), (i, 0, 0)), i % 2

    monkeypatch.setattr(torchvision.datasets, "Pixels", Pixels, raising=False)
    monkeypatch.setattr(torchvision.datasets, "__all__", ["Pixels"])
    order = draw.permutation(20, seed=0, epoch=0, stream=convert.SHUFFLE_STREAM)
    for src in ("shapes:20", "torchvision:Pixels"):
        assert run(capsys, src, tmp_path / "a.beton", "--overwrite", "--root", tmp_path)[0] == 0
        assert run(capsys, src, tmp_path / "b.beton", "--overwrite", "--root", tmp_path, "--shuffle")[0] == 0
        plain, shuffled = read(tmp_path / "a.beton"), read(tmp_path / "b.beton")
        assert shuffled == [plain[i] for i in order] != plain


@pytest.mark.parametrize("shuffle", [(), ("--shuffle",)])
@pytest.mark.parametrize("limit", [(), ("--limit", 21)])
def test_parts_are_together_what_one_run_makes(tmp_path, capsys, folder, shuffle, limit):
    put(Path(folder), {"beside.jpg": encode(smooth()), "cat/broken.jpg": b"x", "zebra/z.jpg": encode(smooth(9, 9))})
    assert run(capsys, folder, tmp_path / "whole.beton", *shuffle, *limit)[0] == 0
    whole = json.loads((tmp_path / "whole.json").read_text())
    summaries = []
    for part in range(5):
        status, table, err = run(
            capsys, folder, tmp_path / f"part-{part}.beton", "--part", f"{part}/5", *shuffle, *limit, "--workers", 2
        )
        assert status == 0 and f"{part}/5, counted from 0" in table, err
        summaries.append(json.loads((tmp_path / f"part-{part}.json").read_text()))
        assert summaries[-1]["part"] == f"{part}/5" and summaries[-1]["order"] == whole["order"]
        assert summaries[-1]["classes"] == ["cat", "dog", "zebra"]
        assert 3 <= summaries[-1]["images"] <= 7
    parts = [sample for part in range(5) for sample in read(tmp_path / f"part-{part}.beton")]
    assert parts == read(tmp_path / "whole.beton")
    assert [sum(c) for c in zip(*(s["counts"] for s in summaries), strict=True)] == whole["counts"]
    assert sum(s["skipped"] for s in summaries) == whole["skipped"]
    assert 0 in np.array([s["counts"] for s in summaries])  # a class without an image in some part
    with open_data(str(tmp_path / "part-{0..4}.beton")) as data:
        assert data.classes == ["cat", "dog", "zebra"]
        assert [(bytes(s.jpeg), data.classes[s.label]) for s in data] == parts


def test_parts_need_no_common_size(tmp_path, capsys):
    """Empty parts are refused, by name and number."""
    src = put(tmp_path / "src", {f"{i}.jpg": encode(smooth(seed=i)) for i in range(2)})
    status, _, err = run(capsys, src, tmp_path / "o.beton", "--part", "0/3")
    assert status == 2 and "--part 0/3 of 2 images holds none; make fewer parts" in err
    assert run(capsys, src, tmp_path / "1.beton", "--part", "1/3")[0] == 0
    assert run(capsys, src, tmp_path / "2.beton", "--part", "2/3")[0] == 0
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["1.beton", "1.json", "2.beton", "2.json", "src"]


# What becomes upright 8-bit RGB


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "GIF", "WEBP", "PPM", "CMYK", "misnamed"])
def test_other_formats(tmp_path, capsys, form):
    image = smooth(70, 90)
    image = {"GIF": image.quantize(64), "CMYK": image.convert("CMYK")}.get(form, image)
    options = {"WEBP": {"lossless": True}, "CMYK": {"quality": 95}}.get(form, {})
    content = encode(image, {"CMYK": "JPEG", "misnamed": "PNG"}.get(form, form), **options)
    name = "x.jpg" if form in ("CMYK", "misnamed") else f"x.{form.lower()}"
    sample = convert_one(tmp_path, capsys, content, name=name)
    assert sample.mode == MODE_JPEG
    assert_close(sample, image, limit=4 if form in ("GIF", "CMYK") else 2)


def test_tiny_png_is_exact(tmp_path, capsys):
    """CIFAR as PNGs: no pixel changes."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (32, 64, 3), dtype=np.uint8)
    sample = convert_one(tmp_path, capsys, encode(Image.fromarray(image), "PNG"), name="x.png")
    assert sample.mode == MODE_RAW
    np.testing.assert_array_equal(pixels(sample), image)
    larger = convert_one(tmp_path, capsys, encode(smooth(32, 65), "PNG"), name="x.png")
    assert larger.mode == MODE_JPEG


def test_sixteen_bit_png_is_scaled_not_clipped(tmp_path, capsys):
    values = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    sample = convert_one(tmp_path, capsys, encode(Image.fromarray(values), "PNG"), name="x.png")
    want = np.repeat(np.round(values / 257).astype(np.uint8)[..., None], 3, axis=2)
    np.testing.assert_array_equal(pixels(sample), want)


def test_sixteen_bit_colour_png(tmp_path, capsys):
    """Pillow cannot write one, so by hand: rows of RGB, 16 bit, the value 257 k means k of 8 bit."""
    import zlib

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    levels = np.arange(4 * 4 * 3, dtype=np.uint16).reshape(4, 4, 3) * 5
    rows = b"".join(b"\0" + (row * 257).astype(">u2").tobytes() for row in levels)
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    np.testing.assert_array_equal(pixels(convert_one(tmp_path, capsys, content, name="x.png")), levels)


def test_palette_one_bit_and_gray(tmp_path, capsys):
    tiny = smooth(20, 30)
    for image in (tiny.quantize(16), tiny.convert("1"), tiny.convert("L")):
        sample = convert_one(tmp_path, capsys, encode(image, "PNG"), name="x.png")
        np.testing.assert_array_equal(pixels(sample), np.asarray(image.convert("RGB")))


def test_transparency_becomes_white(tmp_path, capsys):
    image = smooth(16, 16).convert("RGBA")
    alpha = np.zeros((16, 16), np.uint8)
    alpha[:8], alpha[8:12] = 255, 128
    image.putalpha(Image.fromarray(alpha))
    got = pixels(convert_one(tmp_path, capsys, encode(image, "PNG"), name="x.png")).astype(int)
    colour = np.asarray(image)[..., :3].astype(int)
    np.testing.assert_array_equal(got[:8], colour[:8])
    assert (got[12:] == 255).all()
    assert np.abs(got[8:12] - (colour[8:12] * 128 + 255 * 127) / 255).max() <= 1

    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.paste(0, (0, 0, 4, 8))
    sample = convert_one(tmp_path, capsys, encode(palette, "PNG", transparency=0), name="x.png")
    assert pixels(sample)[0].tolist() == [[255, 255, 255]] * 4 + [[40, 50, 60]] * 4


def test_first_frame_of_an_animation(tmp_path, capsys):
    frames = [Image.new("P", (20, 20), k) for k in range(2)]
    for frame in frames:
        frame.putpalette([200, 0, 0, 0, 200, 0])
    content = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(convert_one(tmp_path, capsys, content, name="x.gif"))[3, 3].tolist() == [200, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("verify", ["--verify", "--no-verify"])
def test_exif_orientation(tmp_path, capsys, orientation, verify):
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "maker"  # another tag in front
    content = encode(smooth(), exif=exif, quality=95)
    sample = convert_one(tmp_path, capsys, content, verify)
    assert (bytes(sample.jpeg) == content) == (orientation == 1)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert_close(sample, upright, limit=1)


def test_max_side(tmp_path, capsys):
    small, large = encode(smooth(48, 64)), encode(smooth(100, 200, seed=2), quality=95)
    wide = encode(smooth(64, 300, seed=3), "PNG")
    src = put(tmp_path / "src", {"a.jpg": small, "b.jpg": large, "c.png": wide})
    status, table, err = run(capsys, src, tmp_path / "o.beton", "--max-side", 64, "--quality", 80)
    assert status == 0, err
    samples = list(Reader(tmp_path / "o.beton"))
    assert bytes(samples[0].jpeg) == small
    assert [(s.height, s.width) for s in samples] == [(48, 64), (32, 64), (14, 64)]
    assert_close(samples[1], smooth(100, 200, seed=2).resize((64, 32), Image.Resampling.LANCZOS), limit=4)
    content = json.loads((tmp_path / "o.json").read_text())
    assert content["stored"] == {"original": 1, "smaller": 2}
    after = len(samples[1].jpeg) + len(samples[2].jpeg)
    assert content["smaller_bytes"] == {"before": len(large) + len(wide), "after": after}
    assert "re-encoded to 64 px" in table
    run(capsys, src, tmp_path / "best.beton", "--max-side", 64, "--quality", 100)
    assert Reader(tmp_path / "best.beton").size[1] > len(samples[1].jpeg)


def detailed(height, width):
    """A gray picture with detail of every size, as photographs have: averaging differs from picking pixels."""
    rng = np.random.default_rng(5)
    pixels = np.zeros((height, width))
    for side in (4, 16, 64, 256, max(height, width)):
        coarse = Image.fromarray(rng.integers(0, 256, (side, side), dtype=np.uint8))
        pixels += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=float) / 5
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGB")


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize(
    ("max_side", "decoded"), [(60, 126), (100, 252), (125, 252), (127, 503), (250, 503), (252, 1006), (900, 1006)]
)
def test_large_jpegs_are_decoded_small(monkeypatch, orientation, max_side, decoded):
    """At 1/2, 1/4, 1/8 where twice the wanted size is left; that is close to Lanczos from all pixels, turned or not."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(detailed(757, 1006), quality=92, exif=exif)
    full = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    size = images._fitted(full.size, max_side)
    want = np.asarray(full.resize(size, Image.Resampling.LANCZOS), float)
    seen, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda image, *a, **o: seen.append(image.size) or resize(image, *a, **o))
    stored = images.store(content, max_side=max_side, quality=100)
    assert seen == [(decoded, -(-decoded * 757 // 1006))]
    assert (stored.width, stored.height, stored.how) == (*size, "smaller")
    got = np.asarray(Image.open(io.BytesIO(stored.blob)), float)
    assert 10 * np.log10(255**2 / ((got - want) ** 2).mean()) > 46  # 36-46 if the padding of odd sizes were counted in


# What is skipped


def zoo():
    """Files that are called images and are none, and a piece of the reason each must be given."""
    good, png = encode(smooth(100, 120)), encode(smooth(70, 80), "PNG")
    frame = good.index(b"\xff\xc0")
    huge = good[: frame + 5] + struct.pack(">HH", 60000, 60000) + good[frame + 9 :]
    huge_png = png[:16] + struct.pack(">II", 60000, 60000) + png[24:]
    floats = encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")
    return {
        "empty.jpg": (b"", "empty file"),
        "text.jpg": (b"<html>404 not found</html>", "not an image"),
        "half.jpg": (good[: len(good) // 2], "truncated"),
        "end.jpg": (good[:-200], "truncated"),
        "zeros.jpg": (good[: len(good) // 2] + bytes(len(good) // 2), "damaged"),
        "head.jpg": (good[:100], "damaged"),
        "soi.jpg": (b"\xff\xd8", "not an image"),
        "huge.jpg": (huge, "decompression bomb"),
        "huge.png": (huge_png, ""),
        "half.png": (png[: len(png) // 2], "damaged"),
        "flipped.png": (png[:60] + bytes([png[60] ^ 255]) + png[61:], "damaged"),
        "floats.tif": (floats, "floating-point"),
    }


@pytest.mark.parametrize("verify", ["--verify", "--no-verify"])
def test_bad_files_are_skipped_with_a_reason(tmp_path, capsys, verify):
    bad = zoo()
    good = {f"good{i}.jpg": encode(smooth(seed=i)) for i in range(3)}
    src = put(tmp_path / "src", {**good, **{name: content for name, (content, _) in bad.items()}})
    status, table, err = run(capsys, src, tmp_path / "o.beton", verify)
    assert status == 0, err
    assert sorted(bytes(s.jpeg) for s in Reader(tmp_path / "o.beton")) == sorted(good.values())
    rows = list(csv.reader((tmp_path / "o.skipped.csv").open()))
    assert rows[0] == ["path", "reason"]
    reasons = dict(rows[1:])
    assert reasons.keys() == bad.keys()
    for name, (_, piece) in bad.items():
        assert piece in reasons[name] and reasons[name], name
    assert json.loads((tmp_path / "o.json").read_text())["skipped"] == len(bad)
    assert "o.skipped.csv" in table


def test_strict_fails_and_leaves_nothing(tmp_path, capsys):
    src = put(tmp_path / "src", {"a.jpg": encode(smooth()), "b.jpg": b"broken"})
    status, _, err = run(capsys, src, tmp_path / "o.beton", "--strict")
    assert status == 2 and err.count("\n") == 1 and "b.jpg: not an image" in err
    src = put(tmp_path / "src2", {"logo.jpg": encode(smooth()), "cat/b.jpg": encode(smooth())})
    status, _, err = run(capsys, src, tmp_path / "o.beton", "--strict")
    assert status == 2 and "logo.jpg" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src", "src2"]


def test_unreadable_file_is_skipped(tmp_path, capsys):
    src = put(tmp_path / "src", {"a.jpg": encode(smooth())})
    (tmp_path / "src" / "gone.jpg").symlink_to("nowhere")
    assert run(capsys, src, tmp_path / "o.beton")[0] == 0
    assert "gone.jpg,cannot be read: No such file" in (tmp_path / "o.skipped.csv").read_text()


def test_image_larger_than_a_page(tmp_path, capsys):
    rng = np.random.default_rng(0)
    noise = encode(Image.fromarray(rng.integers(0, 256, (900, 900, 3), dtype=np.uint8)), quality=100, subsampling=0)
    assert 2 << 20 < len(noise) < 4 << 20
    src = put(tmp_path / "src", {"a.jpg": encode(smooth()), "noise.jpg": noise})
    assert run(capsys, src, tmp_path / "two.beton", "--page-size", 2 << 20)[0] == 0
    assert "do not fit a page" in (tmp_path / "two.skipped.csv").read_text()
    assert run(capsys, src, tmp_path / "four.beton", "--page-size", 4 << 20)[0] == 0
    assert bytes(Reader(tmp_path / "four.beton")[1].jpeg) == noise


def test_pages_grow_with_the_largest_original(tmp_path, capsys):
    content = encode(smooth()) + bytes(9 << 20)
    sample = convert_one(tmp_path, capsys, content)
    assert len(sample.jpeg) == len(content) and Reader(tmp_path / "one.beton").page_size == 16 << 20


def test_head_of_a_jpeg_agrees_with_pillow(tmp_path):
    del tmp_path
    for options in ({}, {"progressive": True}, {"icc_profile": b"x" * 200_000}, {"comment": b"\xff\xc0" * 50}):
        head = images.jpeg_head(encode(smooth(31, 47), **options))
        assert (head.height, head.width, head.components, head.orientation) == (31, 47, 3, 1)
    content = encode(smooth())
    for cut in range(0, content.index(b"\xff\xda") + 1, 7):  # never past the end, whatever is cut off
        assert images.jpeg_head(content[:cut]) is None


# How it fails


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/nothing", "{tmp}/o.beton"], "does not exist"),
        (["{src}", "{tmp}/no/o.beton"], "does not exist; make it first"),
        (["{src}", "{tmp}"], "is a folder"),
        (["{src}", "{tmp}/o.beton", "--quality", "80"], "--max-side"),
        (["{src}", "{tmp}/o.beton", "--max-side", "0"], "--max-side 0"),
        (["{src}", "{tmp}/o.beton", "--max-side", "9", "--quality", "101"], "--quality 101"),
        (["{src}", "{tmp}/o.beton", "--workers", "0"], "--workers 0"),
        (["{src}", "{tmp}/o.beton", "--limit", "0"], "--limit 0"),
        (["{src}", "{tmp}/o.beton", "--page-size", "12345"], "power of two"),
        (["{src}", "{tmp}/o.beton", "--subdir", "bird"], "no folder 'bird'"),
        (["{src}", "{tmp}/o.beton", "--part", "3"], "write it as 3/16"),
        (["{src}", "{tmp}/o.beton", "--part", "a/b"], "write it as 3/16"),
        (["{src}", "{tmp}/o.beton", "--part", "16/16"], "counted from 0, so write 0/16 to 15/16"),
        (["{src}", "{tmp}/o.beton", "--part", "0/0"], "counted from 0"),
        (["{src}", "{tmp}/o.beton", "--part", "0/31"], "make fewer parts"),
        (["{src}", "{tmp}/o.beton", "--shuffle", "--seed", "4294967296"], "--seed 4294967296"),
        (["torchvision:cifra10", "{tmp}/o.beton"], "did you mean CIFAR10"),
        (["{tmp}/x-{0..2}.tar", "{tmp}/o.beton"], "3 of 3 shards"),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, folder, arguments, message):
    filled = [a.replace("{tmp}", str(tmp_path)).replace("{src}", folder) for a in arguments]
    status, out, err = run(capsys, *filled)
    assert status == 2 and out == ""
    assert err.startswith("fastssl-convert: error: ") and err.count("\n") == 1 and message in err
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_unknown_option_is_refused(tmp_path, folder):
    with pytest.raises(SystemExit) as caught:
        convert.main([folder, str(tmp_path / "o.beton"), "--max-sied", "3"])
    assert caught.value.code == 2


def test_only_broken_images(tmp_path, capsys):
    src = put(tmp_path / "src", {"a.jpg": b"x", "b.jpg": b""})
    status, _, err = run(capsys, src, tmp_path / "o.beton")
    assert status == 2 and "none of the 2 images" in err and "b.jpg: empty file" in err
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_existing_files_are_not_overwritten(tmp_path, capsys, folder):
    out = tmp_path / "o.beton"
    out.write_bytes(b"precious")
    status, _, err = run(capsys, folder, out)
    assert status == 2 and "--overwrite" in err and out.read_bytes() == b"precious"
    status, _, err = run(capsys, tmp_path / "nothing", out, "--overwrite")
    assert status == 2 and out.read_bytes() == b"precious"  # a failure keeps the old one
    (tmp_path / "o.skipped.csv").write_text("of an earlier run")
    assert run(capsys, folder, out, "--overwrite")[0] == 0
    assert len(Reader(out)) == 30 and not (tmp_path / "o.skipped.csv").exists()
    (tmp_path / "other.json").write_text('{"annotations": []}')
    status, _, err = run(capsys, folder, tmp_path / "other.beton")
    assert status == 2 and "other.json exists" in err


def fail_with(number):
    def fail(*_args, **_options):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("where", "name", "does", "message"),
    [
        *((beton.Writer, name, fail_with(errno.ENOSPC), "is full") for name in ("extend", "flush", "commit")),
        (convert, "_write", fail_with(errno.EIO), "Input/output error"),  # of the summary
        (convert.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000), "has 1 kB free"),
    ],
)
def test_disks_that_fail(tmp_path, capsys, folder, monkeypatch, where, name, does, message):
    monkeypatch.setattr(where, name, does)
    status, out, err = run(capsys, folder, tmp_path / "o.beton")
    assert status == 2 and out == "" and err.count("\n") == 1 and message in err
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def run_limited(bytes_per_file, *arguments):
    """The command in a process that cannot write larger files."""
    code = "import resource, sys; from loaders.convert.command import main; "
    code += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes_per_file}, {bytes_per_file})); sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


def test_a_file_that_outgrows_its_limit(tmp_path):
    """The real thing, a write that fails half-way: a limit on the size of files."""
    src = put(tmp_path / "src", {f"{i}.jpg": encode(smooth(seed=i)) + bytes(400_000) for i in range(30)})
    done = run_limited(9_000_000, src, tmp_path / "o.beton")
    assert done.returncode == 2 and "fastssl-convert: error:" in done.stderr and "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def start_and_wait_for_writing(tmp_path, src, *options):
    """The command in a process of its own, stopped from finishing by much to do."""
    command = [sys.executable, "-c", "import sys; from loaders.convert.command import main; sys.exit(main())"]
    command += [src, str(tmp_path / "o.beton"), "--workers", "1", *options]
    partial = tmp_path / "o.beton.partial"
    before = partial.stat().st_mtime_ns if partial.exists() else None  # of a run that was killed
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    for _ in range(12000):
        begun = partial.exists() and partial.stat().st_mtime_ns != before
        if begun or process.poll() is not None:
            return process
        time.sleep(0.005)
    process.kill()
    raise AssertionError("the command did not begin to write")


@pytest.mark.parametrize(("number", "options"), [(signal.SIGINT, ()), (signal.SIGTERM, ("--shuffle", "--part", "1/2"))])
def test_interrupt_leaves_nothing(tmp_path, number, options):
    process = start_and_wait_for_writing(tmp_path, "shapes:1000000", *options)
    process.send_signal(number)
    process.send_signal(number)  # impatience does not disturb the cleaning up
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err == "fastssl-convert: error: interrupted; nothing was kept\n"
    assert list(tmp_path.iterdir()) == []


def test_kill_leaves_a_temporary_name_that_the_next_run_removes(tmp_path, capsys, folder):
    process = start_and_wait_for_writing(tmp_path, "shapes:1000000")
    process.kill()
    process.communicate(timeout=60)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.beton.partial", "src"]
    assert run(capsys, folder, tmp_path / "o.beton")[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.beton", "o.json", "src"]


def assert_consistent(out, folder):
    """OUT is missing, or whole and beside a summary of its own; returns the seed of its order, None if missing."""
    if not out.exists():
        return None
    reader, content = Reader(out), json.loads(beton.sidecar_path(out, ".json").read_text())
    assert content["bytes"] == out.stat().st_size and content["images"] == len(reader)
    files = sorted(Path(folder).rglob("*.jpg"))
    part, num_parts = map(int, content["part"].split("/"))
    order = draw.permutation(len(files), seed=content["options"]["seed"], epoch=0, stream=convert.SHUFFLE_STREAM)
    order = order[len(files) * part // num_parts : len(files) * (part + 1) // num_parts]
    assert read(out) == [(files[i].read_bytes(), files[i].parent.name) for i in order]
    assert not beton.sidecar_path(out, ".skipped.csv").exists()
    return content["options"]["seed"]


def run_until(tmp_path, num_changes, *arguments):
    """The command in a child process that dies, as if by kill -9, before its nth change of a folder or opening of a
    file for writing. Returns whether it lived."""
    changes = itertools.count()

    def watch(event, details):
        if event in ("os.rename", "os.remove") or (event == "open" and details[2] & os.O_ACCMODE):
            touches = isinstance(details[0], (str, Path)) and str(details[0]).startswith(str(tmp_path))
            if touches and next(changes) == num_changes:
                os._exit(9)

    child = os.fork()
    if child == 0:
        try:
            sys.addaudithook(watch)
            os._exit(convert.main([str(a) for a in arguments]))
        finally:
            os._exit(3)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 0


def test_killed_between_any_two_changes(tmp_path, capsys, folder):
    """A run that replaces an older file dies before each step in turn."""
    out = tmp_path / "out" / "o.beton"
    out.parent.mkdir()
    options = ("--shuffle", "--part", "1/2", "--overwrite", "--workers", 1)
    seeds, lived, step = [], False, 0
    while not lived:
        assert run(capsys, folder, out, *options, "--seed", 1)[0] == 0
        (out.parent / "o.skipped.csv").write_text("of an older run")
        lived = run_until(out.parent, step, folder, out, *options, "--seed", 2)
        if (out.parent / "o.skipped.csv").exists() and out.exists():
            (out.parent / "o.skipped.csv").unlink()  # the older run's, which is still whole
        seeds.append(assert_consistent(out, folder))
        step += 1
        again = () if seeds[-1] is None else ("--overwrite",)
        assert run(capsys, folder, out, "--shuffle", "--part", "1/2", *again, "--seed", 3)[0] == 0
        assert assert_consistent(out, folder) == 3
        assert sorted(p.name for p in out.parent.iterdir()) == ["o.beton", "o.json"]
    assert step > 7 and seeds == sorted(seeds, key=[1, None, 2].index) and set(seeds) == {1, None, 2}


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path, capsys):
    contents = [encode(smooth(40 + i, 90 - i, seed=i)) for i in range(50)]
    src = put(tmp_path / "src", {f"{i % 7}/{i:05d}.jpg": contents[i % 50] for i in range(6000)})
    out, rng = tmp_path / "out" / "o.beton", np.random.default_rng()
    out.parent.mkdir()
    for seed in range(25):
        options = ("--shuffle", "--part", f"{seed % 3}/3", "--overwrite", "--seed", str(seed))
        process = start_and_wait_for_writing(out.parent, src, *options)
        time.sleep(rng.uniform(0, 0.15))  # a whole run takes about 0.1 s from here
        process.kill()
        process.communicate(timeout=60)
        assert_consistent(out, src)
    assert run(capsys, src, out, "--shuffle", "--part", "0/1", "--overwrite", "--seed", 99)[0] == 0
    assert assert_consistent(out, src) == 99
    assert sorted(p.name for p in out.parent.iterdir()) == ["o.beton", "o.json"]


def test_generated_pictures(tmp_path, capsys):
    from loaders.convert import shapes

    assert run(capsys, "shapes:24", tmp_path / "o.beton")[0] == 0
    reader = Reader(tmp_path / "o.beton")
    assert reader.classes == list(shapes.CLASSES)
    for i, sample in enumerate(reader):
        assert (bytes(sample.jpeg), sample.label) == shapes.render(i, seed=0, split="train")


def test_full_disk_while_unpacking(tmp_path, folder):
    with tarfile.open(tmp_path / "x.tgz", "w:gz") as tar:
        tar.add(folder, "top")
    done = run_limited(9_000, tmp_path / "x.tgz", tmp_path / "o.beton")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "File too large" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src", "x.tgz"]


def test_from_another_thread(tmp_path, folder):
    """Python handles signals in the main thread only; elsewhere the function works without."""
    from concurrent.futures import ThreadPoolExecutor

    config = convert.ConvertOptions(src=folder, out=tmp_path / "o.beton")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(convert.convert, config).result().images == 30
