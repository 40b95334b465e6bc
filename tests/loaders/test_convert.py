"""fastssl-convert from the command line: what is in the file afterwards, and what is left when it fails."""

import csv
import errno
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from loaders import beton, convert, images
from loaders.beton import MODE_JPEG, MODE_RAW, Reader


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
    assert content["versions"]["torch"] and content["seconds"] > 0


def test_any_number_of_workers_writes_the_same_file(tmp_path, capsys):
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
    "options",
    [
        {},
        {"progressive": True},
        {"subsampling": 0},
        {"restart_marker_blocks": 2},
        {"optimize": True, "comment": b"\xff\xd9 an end inside a comment"},
        {"icc_profile": b"p" * 70_000},
        {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"},
    ],
    ids=lambda o: "+".join(o) or "plain",
)
def test_plain_jpegs_are_original(tmp_path, capsys, options, verify):
    content = encode(smooth(71, 33), **options)
    sample = convert_one(tmp_path, capsys, content, verify)
    assert bytes(sample.jpeg) == content and (sample.height, sample.width) == (71, 33)


@pytest.mark.parametrize("tail", [b"\0" * 100, b"trailing text", b"\0\0x", encode(smooth(8, 8))])
def test_bytes_behind_the_end_are_harmless(tmp_path, capsys, tail):
    content = encode(smooth()) + tail
    assert bytes(convert_one(tmp_path, capsys, content).jpeg) == content


def test_gray_jpeg_stays(tmp_path, capsys):
    content = encode(smooth(bands=1))
    sample = convert_one(tmp_path, capsys, content)
    assert bytes(sample.jpeg) == content and (sample.height, sample.width) == (60, 80)


def test_wrong_extension_is_judged_by_content(tmp_path, capsys):
    content = encode(smooth())
    assert bytes(convert_one(tmp_path, capsys, content, name="x.png").jpeg) == content
    assert_close(convert_one(tmp_path, capsys, encode(smooth(70, 90), "PNG"), name="x.jpg"), smooth(70, 90))


# What becomes upright 8-bit RGB


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "GIF", "WEBP", "PPM"])
def test_other_formats(tmp_path, capsys, form):
    image = smooth(70, 90)
    options = {"lossless": True} if form == "WEBP" else {}
    if form == "GIF":
        image = image.quantize(64)
    sample = convert_one(tmp_path, capsys, encode(image, form, **options), name=f"x.{form.lower()}")
    assert sample.mode == MODE_JPEG
    assert_close(sample, image, limit=4 if form == "GIF" else 2)


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


def test_cmyk_jpeg(tmp_path, capsys):
    image = smooth().convert("CMYK")
    sample = convert_one(tmp_path, capsys, encode(image, quality=95))
    assert_close(sample, image.convert("RGB"), limit=4)


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


@pytest.mark.parametrize("when", ["add", "flush", "commit"])
def test_full_disk(tmp_path, capsys, folder, monkeypatch, when):
    monkeypatch.setattr(beton.Writer, when, fail_with(errno.ENOSPC))
    status, out, err = run(capsys, folder, tmp_path / "o.beton")
    assert status == 2 and out == "" and err.count("\n") == 1 and "is full" in err
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_failure_while_writing_the_summary(tmp_path, capsys, folder, monkeypatch):
    monkeypatch.setattr(Path, "write_text", fail_with(errno.EIO))
    status, _, err = run(capsys, folder, tmp_path / "o.beton")
    assert status == 2 and "Input/output error" in err
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_too_little_space_is_said_before(tmp_path, capsys, folder, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda _: usage)
    status, _, err = run(capsys, folder, tmp_path / "o.beton")
    assert status == 2 and "has 1 kB free" in err


def test_a_file_that_outgrows_its_limit(tmp_path):
    """The real thing, a write that fails half-way: a limit on the size of files."""
    code = "import resource, sys; from loaders.convert import main; "
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (9_000_000, 9_000_000)); sys.exit(main())"
    src = put(tmp_path / "src", {f"{i}.jpg": encode(smooth(seed=i)) + bytes(400_000) for i in range(30)})
    command = [sys.executable, "-c", code, src, str(tmp_path / "o.beton")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "fastssl-convert: error:" in done.stderr and "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def start_and_wait_for_writing(tmp_path, src):
    """The command in a process of its own, stopped from finishing by much to do."""
    command = [sys.executable, "-c", "import sys; from loaders.convert import main; sys.exit(main())"]
    command += [src, str(tmp_path / "o.beton"), "--workers", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for _ in range(1200):
        if (tmp_path / "o.beton.partial").exists() or process.poll() is not None:
            return process
        time.sleep(0.05)
    process.kill()
    raise AssertionError("the command did not begin to write")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_nothing(tmp_path, number):
    process = start_and_wait_for_writing(tmp_path, "shapes:1000000")
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


def test_generated_pictures(tmp_path, capsys):
    from loaders import shapes

    assert run(capsys, "shapes:24", tmp_path / "o.beton")[0] == 0
    reader = Reader(tmp_path / "o.beton")
    assert reader.classes == list(shapes.CLASSES)
    for i, sample in enumerate(reader):
        assert (bytes(sample.jpeg), sample.label) == shapes.render(i, seed=0, split="train")


@pytest.mark.parametrize("workers", [1, 3])
def test_compressed_tar_is_read_in_order(tmp_path, capsys, folder, workers):
    """Read by one thread, prepared by several; the same file as from an uncompressed one."""
    import tarfile

    for mode in ("w", "w:gz"):
        with tarfile.open(tmp_path / f"{mode[2:] or 'tar'}", mode) as tar:
            tar.add(folder, "top")
        name = mode[2:] or "tar"
        assert run(capsys, tmp_path / name, tmp_path / f"{name}.beton", "--workers", workers, "--limit", 20)[0] == 0
    assert (tmp_path / "gz.beton").read_bytes() == (tmp_path / "tar.beton").read_bytes()
    assert Reader(tmp_path / "gz.beton").classes == ["cat", "dog"]


def test_from_another_thread(tmp_path, folder):
    """Python handles signals in the main thread only; elsewhere the function works without."""
    from concurrent.futures import ThreadPoolExecutor

    config = convert.Config(src=folder, out=tmp_path / "o.beton")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(convert.convert, config).result().images == 30
