"""The .beton file: what the writer writes is what the format says, and the reader refuses all else."""

import json
import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders import beton
from loaders.errors import UserError

PAGE = 2 << 20
HEADER = np.dtype([("version", "<u2"), ("fields", "<u2"), ("page", "<u4"), ("num", "<u8"), ("table", "<u8")])


def write(path, blobs, capacity=None, **options):
    with beton.Writer(path, capacity or len(blobs), page_size=PAGE, **options) as writer:
        for i, blob in enumerate(blobs):
            writer.add(blob, 10 + i, 20 + i, 7 * i)
    return path


def patch(path, offset, content):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


@pytest.fixture
def small(tmp_path):
    return write(tmp_path / "small.beton", [b"first", b"the second", b"3"])


def test_round_trip(small):
    with beton.Reader(small) as reader:
        assert len(reader) == 3
        assert [bytes(s.jpeg) for s in reader] == [b"first", b"the second", b"3"]
        sample = reader[1]
        assert sample[1:] == (11, 21, 7, beton.MODE_JPEG)
        assert not sample.jpeg.flags.owndata and not sample.jpeg.flags.writeable
        assert bytes(reader[-1].jpeg) == b"3"
        with pytest.raises(IndexError):
            reader[3]
        assert reader.height.tolist() == [10, 11, 12] and reader.height.dtype == np.int32
        assert reader.width.tolist() == [20, 21, 22] and reader.width.dtype == np.int32
        assert reader.label.tolist() == [0, 7, 14] and reader.label.dtype == np.int64
        assert reader.mode.tolist() == [0, 0, 0] and reader.mode.dtype == np.uint8
        assert reader.size.tolist() == [5, 10, 1] and reader.size.dtype == np.int64
        assert reader.page_size == PAGE and reader.pointer[0] == PAGE
        assert reader.fields == (("image", beton.TYPE_IMAGE), ("label", beton.TYPE_INT))


def test_layout_byte_for_byte(small):
    """Against the format's description, written out by hand."""
    content = small.read_bytes()
    table = 2 * PAGE
    header = np.array((2, 2, PAGE, 3, table), HEADER).tobytes()
    fields = b"".join(
        bytes([kind]) + name.ljust(16, b"\0") + bytes(1024) for kind, name in ((2, b"image"), (1, b"label"))
    )
    records = b"".join(
        b"\0"  # mode
        + int(20 + i).to_bytes(2, "little")  # width before height
        + int(10 + i).to_bytes(2, "little")
        + pointer.to_bytes(8, "little")
        + bytes(3)  # the label is aligned to 8
        + int(7 * i).to_bytes(8, "little")
        for i, pointer in enumerate((PAGE, PAGE + 5, PAGE + 15))
    )
    head = header + fields + records
    rows = np.array([(0, PAGE, 5), (1, PAGE + 5, 10), (2, PAGE + 15, 1)], "<u8").tobytes()
    assert content == head.ljust(PAGE, b"\0") + b"firstthe second3".ljust(PAGE, b"\0") + rows


def test_no_blob_crosses_a_page(tmp_path):
    sizes = [PAGE - 10, 10, 11, PAGE, 1]
    reader = beton.Reader(write(tmp_path / "x.beton", [bytes([i + 1]) * size for i, size in enumerate(sizes)]))
    assert (reader.pointer // PAGE).tolist() == [1, 1, 2, 3, 4]
    assert ((reader.pointer + reader.size - 1) // PAGE == reader.pointer // PAGE).all()
    assert [set(s.jpeg) for s in reader] == [{1}, {2}, {3}, {4}, {5}]
    assert reader.path.stat().st_size == 5 * PAGE + 24 * 5


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, PAGE), min_size=1, max_size=6), st.integers(0, 200_000))
def test_any_sizes_and_spare_capacity(tmp_path_factory, sizes, spare):
    path = tmp_path_factory.mktemp("any") / "x.beton"
    blobs = [np.full(size, i, np.uint8) for i, size in enumerate(sizes)]
    reader = beton.Reader(write(path, blobs, capacity=len(sizes) + spare))
    assert reader.size.tolist() == sizes
    assert reader.pointer.min() >= 24 + 2 * 1041 + 24 * (len(sizes) + spare)
    for sample, blob in zip(reader, blobs, strict=True):
        np.testing.assert_array_equal(sample.jpeg, blob)


def test_raw_pixels(tmp_path):
    pixels = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    with beton.Writer(tmp_path / "raw.beton", 1) as writer:
        writer.add(pixels.tobytes(), 4, 5, 1, beton.MODE_RAW)
    sample = beton.Reader(tmp_path / "raw.beton")[0]
    assert sample.mode == beton.MODE_RAW
    np.testing.assert_array_equal(sample.jpeg.reshape(4, 5, 3), pixels)


def test_only_the_finished_file_has_the_name(tmp_path):
    path = tmp_path / "x.beton"
    writer = beton.Writer(path, 2, page_size=PAGE)
    writer.add(b"a", 1, 1, 0)
    assert [p.name for p in tmp_path.iterdir()] == ["x.beton.partial"]
    with pytest.raises(UserError, match="unfinished"):
        beton.Reader(beton.partial_path(path))
    writer.commit()
    writer.abort()  # too late, nothing happens
    assert [p.name for p in tmp_path.iterdir()] == ["x.beton"]
    assert len(beton.Reader(path)) == 1


def test_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), beton.Writer(tmp_path / "x.beton", 2, page_size=PAGE) as writer:
        writer.add(b"a", 1, 1, 0)
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="no sample"), beton.Writer(tmp_path / "x.beton", 2):
        pass
    assert list(tmp_path.iterdir()) == []


def test_old_file_stays_until_the_new_one_is_whole(small):
    with beton.Writer(small, 1, page_size=PAGE) as writer:
        writer.add(b"new", 1, 1, 0)
        assert len(beton.Reader(small)) == 3
    assert bytes(beton.Reader(small)[0].jpeg) == b"new"


def test_leftover_is_taken_over_and_a_live_writer_is_not(tmp_path):
    path = tmp_path / "x.beton"
    beton.partial_path(path).write_bytes(b"left by a killed run" * 1000)
    writer = beton.Writer(path, 1, page_size=PAGE)
    with pytest.raises(UserError, match="another process"):
        beton.Writer(path, 1)
    writer.add(b"a", 1, 1, 0)
    writer.commit()
    with beton.Writer(tmp_path / "y.beton", 1, page_size=PAGE) as other:
        other.add(b"a", 1, 1, 0)
    assert path.read_bytes() == (tmp_path / "y.beton").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((b"a", 0, 1, 0), "sides"),
        ((b"a", 1, 65536, 0), "sides"),
        ((b"", 1, 1, 0), "0 bytes"),
        ((b"a", 1, 1, 0, 2), "mode 2"),
        ((b"ab", 1, 1, 0, beton.MODE_RAW), "2 bytes"),
        ((bytes(PAGE + 1), 1, 1, 0), "does not fit a page"),
    ],
)
def test_writer_refuses(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message), beton.Writer(tmp_path / "x.beton", 1, page_size=PAGE) as writer:
        writer.add(*arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("page_size", [PAGE - 1, PAGE // 2, 3 * PAGE, 1 << 32])
def test_writer_refuses_what_is_outside_the_format(tmp_path, page_size):
    with pytest.raises(UserError, match="power of two"):
        beton.Writer(tmp_path / "x.beton", 1, page_size=page_size)
    with pytest.raises(UserError, match="capacity"), beton.Writer(tmp_path / "x.beton", 1) as writer:
        writer.extend([(b"a", 1, 1, 0, 0)] * 2)
    with pytest.raises(UserError, match="does not exist"):
        beton.Writer(tmp_path / "no" / "x.beton", 1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.unlink(), "does not exist"),
        (lambda p: (p.unlink(), p.mkdir()), "is a folder"),
        (lambda p: (p.unlink(), p.symlink_to(p)), "cannot be read"),  # root may read all but this
        (lambda p: (p.unlink(), os.mkfifo(p)), "is a pipe"),
        (lambda p: p.write_bytes(b""), "is empty"),
        (lambda p: p.write_bytes(b"\x02\0\x02\0"), "not a .beton"),
        (lambda p: p.write_bytes(b"PK\x03\x04" + bytes(range(256)) * 40), "not a .beton"),
        (lambda p: patch(p, 0, b"\x03\0"), "version 3"),
        (lambda p: patch(p, 16, bytes(8)), "unfinished"),
        (lambda p: patch(p, 8, bytes(8)), "no samples"),
        (lambda p: patch(p, 24, b"\x01"), "no RGB image field"),
        (lambda p: patch(p, 24, b"\xff"), "custom type"),
        (lambda p: p.write_bytes(p.read_bytes()[:1000]), "truncated"),
        (lambda p: p.write_bytes(p.read_bytes()[: PAGE + 3]), "truncated"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "truncated"),
        (lambda p: p.write_bytes(p.read_bytes()[:-24]), "truncated"),
        (lambda p: patch(p, 8, (1 << 40).to_bytes(8, "little")), "truncated"),
        (lambda p: patch(p, 24 + 2 * 1041 + 5, b"\xff" * 8), "damaged"),
        (lambda p: patch(p, 24 + 2 * 1041, b"\x01"), "damaged"),  # raw, of the wrong length
        (lambda p: patch(p, 2 * PAGE + 16, (1 << 62).to_bytes(8, "little")), "damaged"),
    ],
)
def test_reader_refuses_in_one_line(small, damage, message):
    damage(small)
    with pytest.raises(UserError, match=message) as caught:
        beton.Reader(small)
    assert str(small) in str(caught.value) and "\n" not in str(caught.value)


def test_table_in_any_order(small):
    content = small.read_bytes()
    rows = np.frombuffer(content[2 * PAGE :], np.uint8).reshape(3, 24)
    small.write_bytes(content[: 2 * PAGE] + rows[[2, 0, 1]].tobytes())
    assert [bytes(s.jpeg) for s in beton.Reader(small)] == [b"first", b"the second", b"3"]


def test_other_fields_and_no_label(tmp_path):
    """Columns: bytes, float, image; aligned as in C: 0, 16, 24. FFCV's own files are in test_ffcv_interop."""
    record = np.dtype(
        {
            "names": ["blob", "blob_size", "weight", "mode", "width", "height", "pointer"],
            "formats": ["<u8", "<u8", "<f8", "u1", "<u2", "<u2", "<u8"],
            "offsets": [0, 8, 16, 24, 25, 27, 29],
            "itemsize": 40,
        }
    )
    records = np.zeros(2, record)
    records["width"], records["height"], records["pointer"] = 8, 9, (PAGE + 3, PAGE)
    kinds = ((3, b"blob"), (0, b"weight"), (2, b"image"))
    fields = b"".join(bytes([kind]) + name.ljust(16, b"\0") + bytes(1024) for kind, name in kinds)
    header = np.array((2, 3, PAGE, 2, 2 * PAGE), HEADER).tobytes()
    table = np.array([(0, PAGE + 3, 2), (1, PAGE, 3)], "<u8").tobytes()
    path = tmp_path / "x.beton"
    path.write_bytes((header + fields + records.tobytes()).ljust(PAGE, b"\0") + b"abcde".ljust(PAGE, b"\0") + table)
    reader = beton.Reader(path)
    assert [bytes(s.jpeg) for s in reader] == [b"de", b"abc"]
    assert reader.label.tolist() == [0, 0]
    assert reader[0][1:] == (9, 8, 0, 0)


def test_classes_come_from_the_json_beside(small):
    reader = beton.Reader(small)
    assert reader.classes is None
    beside = beton.sidecar_path(small, ".json")
    assert beside.name == "small.json"
    beside.write_text(json.dumps({"classes": ["cat", "dog"]}))
    assert reader.classes == ["cat", "dog"]
    beside.write_text("{not json")
    assert reader.classes is None


def test_pickles_as_its_path(small):
    reader = pickle.loads(pickle.dumps(beton.Reader(small)))
    assert bytes(reader[1].jpeg) == b"the second"


def test_close_leaves_views_valid(small):
    reader = beton.Reader(small)
    view = reader[1].jpeg
    reader.close()
    reader.close()
    assert bytes(view) == b"the second" and reader.label.tolist() == [0, 7, 14]
    with pytest.raises(ValueError, match="closed"):
        reader[0]


def test_many_threads_read(tmp_path):
    blobs = [bytes([i % 251]) * (i + 1) for i in range(500)]
    reader, wrong = beton.Reader(write(tmp_path / "x.beton", blobs)), []

    def read(start):
        wrong.extend(i for i in range(start, 500) if bytes(reader[i].jpeg) != blobs[i])

    threads = [threading.Thread(target=read, args=(17 * k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# The kernel's peak of this process, reset before opening. getrusage's ru_maxrss does not do: it is inherited from the
# process that started this one, and below a pytest of 1.8 GB it hides half a gigabyte.
OPEN_AND_MEASURE = """
import sys, loaders.beton

def kilobytes(key):
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(key)).split()[1])

with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = kilobytes("VmRSS")
reader = loaders.beton.Reader(sys.argv[1])
print(len(reader), kilobytes("VmHWM") - before, reader[-1].label, len(reader[-1].jpeg))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from Linux's /proc")
def test_a_file_as_large_as_imagenet_opens_in_little_memory(tmp_path):
    """1.28 M records, the data region a hole in the file: less than 200 MB above an idle process."""
    num, size, path = 1_281_167, 110_000, tmp_path / "big.beton"
    per_page = PAGE // size
    records_end = 24 + 2 * 1041 + 24 * num
    first_page = -(-records_end // PAGE) * PAGE
    i = np.arange(num)
    pointer = first_page + i // per_page * PAGE + i % per_page * size
    table_start = first_page + -(-num // per_page) * PAGE

    head = write(tmp_path / "small.beton", [b"x"]).read_bytes()[24 : 24 + 2 * 1041]
    records = np.zeros(num, beton._record_dtype([beton.TYPE_IMAGE, beton.TYPE_INT]))
    records["f0"]["pointer"], records["f0"]["height"], records["f0"]["width"] = pointer, 375, 500
    records["f1"] = i % 1000
    with open(path, "wb") as file:
        file.write(np.array((2, 2, PAGE, num, table_start), HEADER).tobytes() + head + records.tobytes())
        file.seek(table_start)
        file.write(np.stack([i, pointer, np.full(num, size)], axis=1).astype("<u8").tobytes())
    del records

    command = [sys.executable, "-c", OPEN_AND_MEASURE, str(path)]
    length, kilobytes, label, last = map(int, subprocess.check_output(command).split())
    assert (length, label, last) == (num, (num - 1) % 1000, size)
    assert 30_000 < kilobytes < 200_000  # at least the columns, 33 bytes a sample: else nothing was measured
