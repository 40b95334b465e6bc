"""The `.beton` file (FFCV format version 2): a memory-mapped reader and a one-pass writer.

A file is a header, field descriptors, one fixed-size record per sample, zero padding, pages of blobs, and a table
of where each blob lies. All integers are little-endian, all offsets count bytes from the start of the file:

    [header 24][descriptors 1041 each][records][zeros][page 0][page 1]...[allocation table 24 each]

Files written here are read by FFCV 1.0.2, and the other way round. Unlike FFCV's own writer, this one stores the
bytes it is given, so a JPEG keeps its bytes. With as many samples as its capacity the result equals, byte for
byte, what FFCV's writer produces with one worker from the same blobs.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from loaders.errors import UserError

__all__ = ["MODE_JPEG", "MODE_RAW", "Field", "Reader", "Sample", "Writer", "partial_path", "sidecar_path"]

VERSION = 2
MODE_JPEG, MODE_RAW = 0, 1
DEFAULT_PAGE_SIZE = 8 << 20  # FFCV's default
MIN_PAGE_SIZE, MAX_PAGE_SIZE = 2 << 20, 2 << 30  # FFCV: a power of two, 2 MiB <= page_size < 4 GiB
MAX_SIDE = 65535  # height and width are 16-bit
_MAX_BUFFERS = 1024  # of one pwritev: IOV_MAX of Linux
_GAP = 64 << 10  # bytes between blobs that are read along rather than skipped: what a disk reads ahead anyway

TYPE_INT, TYPE_IMAGE = 1, 2
_IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])  # packed: 13 bytes
_COLUMNS = {  # type_id -> column of the record; 255 (custom) is absent, its width is known to its author only
    0: np.dtype("<f8"),
    TYPE_INT: np.dtype("<i8"),
    TYPE_IMAGE: _IMAGE,
    3: np.dtype([("pointer", "<u8"), ("size", "<u8")]),  # bytes
    4: np.dtype("<u8"),  # ndarray
    5: np.dtype([("pointer", "<u8"), ("size", "<u8")]),  # JSON
    6: np.dtype("<u8"),  # torch tensor
}
_HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ]
)
_DESCRIPTOR = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "V1024")])
_ALLOCATION = np.dtype([("sample_id", "<u8"), ("pointer", "<u8"), ("size", "<u8")])


class Sample(NamedTuple):
    """One image as stored: `jpeg` is a read-only uint8 vector inside the file's memory map, nothing is copied.

    Mode 0: a complete JPEG stream. Mode 1: raw pixels, height*width*3 bytes, rows of interleaved R, G, B.
    """

    jpeg: np.ndarray
    height: int
    width: int
    label: int
    mode: int = MODE_JPEG


class Field(NamedTuple):
    """A column of the file: its name and FFCV's type number (1 int, 2 RGB image, ...)."""

    name: str
    type_id: int


def sidecar_path(path: str | os.PathLike, suffix: str) -> Path:
    """The file that belongs to a .beton: `train.beton` with `.json` -> `train.json` in the same folder."""
    path = Path(path)
    return path.with_name((path.name[: -len(".beton")] if path.suffix == ".beton" else path.name) + suffix)


def partial_path(path: str | os.PathLike) -> Path:
    """The name a file has while it is being written; same folder, so that the final rename is atomic."""
    path = Path(path)
    return path.with_name(path.name + ".partial")


def _record_dtype(type_ids: list[int]) -> np.dtype:
    """Columns in descriptor order, aligned as a C compiler would (inner structs count as alignment 1)."""
    return np.dtype([(f"f{i}", _COLUMNS[t]) for i, t in enumerate(type_ids)], align=True)


class Reader:
    """Opens a .beton; `reader[i]` is a `Sample`. Only header, records and table are read: pixels stay on disk.

    Columns, one entry per sample: `height`, `width` (int32, pixels), `label` (int64; the first int field, zeros
    where there is none), `mode` (uint8), `pointer` and `size` (int64, bytes: where the blob lies in the file).
    `page` is the page that each blob lies in. `classes` are the class names if the converter's .json lies beside the
    file, else None.
    Safe to read from many threads. Pickles as its path and opens again. The map lives as long as a view into it.

    Raises UserError for whatever is not a complete version 2 file with an RGB image field.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if self.path.is_fifo():  # opening one waits for a writer
            raise UserError(f"{self.path} is a pipe, and a .beton is read from all over; name a file")
        try:
            with contextlib.ExitStack() as stack:
                file = stack.enter_context(open(self.path, "rb"))
                self._parse(file)
                self._map: mmap.mmap | None = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                stack.pop_all()  # stays open, for `will_need`
                self._file = file
        except FileNotFoundError:
            raise UserError(f"{self.path} does not exist; make it with fastssl-convert SRC {self.path}") from None
        except IsADirectoryError:
            raise UserError(
                f"{self.path} is a folder, a .beton file is needed; make one with fastssl-convert {self.path} OUT.beton"
            ) from None
        except OSError as e:
            raise UserError(f"{self.path} cannot be read: {e.strerror or e}") from None
        self._bytes: np.ndarray | None = np.frombuffer(self._map, np.uint8)

    def _parse(self, file: BinaryIO) -> None:
        """Read everything but the pages, and check that all of it fits the file."""
        end = os.fstat(file.fileno()).st_size
        header, type_ids = self._parse_head(file, end)
        table_start = int(header["alloc_table_ptr"])
        num = int(header["num_samples"])
        dtype = _record_dtype(type_ids)
        records_start = _HEADER.itemsize + _DESCRIPTOR.itemsize * len(type_ids)
        records_end = records_start + num * dtype.itemsize
        if records_end > table_start or table_start > end or (end - table_start) % _ALLOCATION.itemsize:
            raise UserError(
                f"{self.path} is truncated: {end} bytes do not hold the {num} records and the table at "
                f"{table_start} that its header announces; copy or convert it again"
            )

        # The regions are read, not mapped: 31 MB per million samples would else stay resident.
        records = np.fromfile(file, dtype, num)
        image = records[f"f{type_ids.index(TYPE_IMAGE)}"]
        self.height = image["height"].astype(np.int32)
        self.width = image["width"].astype(np.int32)
        self.mode = image["mode"].copy()
        self.pointer = image["pointer"].astype(np.int64)
        if TYPE_INT in type_ids:
            self.label = records[f"f{type_ids.index(TYPE_INT)}"].astype(np.int64)
        else:
            self.label = np.zeros(num, np.int64)
        del records, image
        file.seek(table_start)
        self.size = _sizes(self.pointer, np.fromfile(file, _ALLOCATION))
        self._check_blobs(records_end, table_start)

    def _parse_head(self, file: BinaryIO, end: int) -> tuple[np.void, list[int]]:
        """Header and field descriptors -> (header, type of each field); sets `fields` and `page_size`."""
        if end == 0:
            raise UserError(f"{self.path} is empty; convert it again")
        not_beton = UserError(f"{self.path} is not a .beton file; make one with fastssl-convert SRC OUT.beton")
        if end < _HEADER.itemsize:
            raise not_beton
        header = np.fromfile(file, _HEADER, 1)[0]
        version, num_fields, page_size = (int(header[k]) for k in ("version", "num_fields", "page_size"))
        if not (0 < num_fields <= 1024 and page_size >= 4096 and page_size & (page_size - 1) == 0):
            raise not_beton
        if version != VERSION:
            raise UserError(f"{self.path} has format version {version}; this reader knows version {VERSION}")
        if header["alloc_table_ptr"] == 0:
            raise UserError(
                f"{self.path} is unfinished: still being written, or its writer was killed; wait, or convert it again"
            )
        if header["num_samples"] == 0:
            raise UserError(f"{self.path} holds no samples; convert it again")
        if _HEADER.itemsize + num_fields * _DESCRIPTOR.itemsize > end:
            raise UserError(f"{self.path} is truncated after {end} bytes; copy or convert it again")
        descriptors = np.fromfile(file, _DESCRIPTOR, num_fields)
        self.page_size = page_size
        self.fields = tuple(Field(d["name"].decode("ascii", "replace"), int(d["type_id"])) for d in descriptors)
        type_ids = [f.type_id for f in self.fields]
        for field in self.fields:
            if field.type_id not in _COLUMNS:
                raise UserError(
                    f"{self.path}: field '{field.name}' has the custom type {field.type_id}, whose layout only its "
                    "author knows; write the file without it"
                )
        if TYPE_IMAGE not in type_ids:
            names = ", ".join(f"'{f.name}'" for f in self.fields)
            raise UserError(f"{self.path} has no RGB image field (it has {names}); write one with an RGBImageField")
        return header, type_ids

    def _check_blobs(self, low: int, high: int) -> None:
        """Raise UserError unless every blob lies in [low, high) and raw ones have the length of their pixels."""
        bad = (self.size <= 0) | (self.size > high) | (self.pointer < low) | (self.pointer > high - self.size)
        bad |= (self.height == 0) | (self.width == 0) | (self.mode > MODE_RAW)
        raw = self.mode == MODE_RAW
        if raw.any():
            bad |= raw & (self.size != self.height.astype(np.int64) * self.width * 3)
        if bad.any():
            i = int(bad.argmax())
            raise UserError(
                f"{self.path} is truncated or damaged: sample {i} ({bad.sum()} of {len(bad)} samples) has no valid "
                "image in it; copy or convert it again"
            )

    def __len__(self) -> int:
        return len(self.pointer)

    def __getitem__(self, index: int) -> Sample:
        if self._bytes is None:
            raise ValueError(f"{self.path} is closed")
        start = int(self.pointer[index])
        return Sample(
            self._bytes[start : start + int(self.size[index])],
            int(self.height[index]),
            int(self.width[index]),
            int(self.label[index]),
            int(self.mode[index]),
        )

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that make up the data set: this one."""
        return (self.path,)

    def locate(self, index: int) -> tuple[Path, int]:
        """The file that holds a sample and its number there."""
        return self.path, index

    @property
    def page(self) -> np.ndarray:
        """Page number of each blob, counted from the start of the file [N]."""
        return self.pointer // self.page_size

    def will_need(self, index_B: np.ndarray, *, whole_pages: bool = False) -> None:
        """Ask the system to read these blobs, or all of the pages they lie in, into its cache; returns at once."""
        if not hasattr(os, "posix_fadvise"):  # macOS: it reads when the bytes are touched
            return
        start = self.pointer[index_B]
        end = start + self.size[index_B]
        if whole_pages:
            start = start // self.page_size * self.page_size
            end = start + self.page_size
        order = np.argsort(start)
        start, end = start[order], end[order]
        first, last = np.ones((2, len(start)), bool)  # of a run of neighbours; blobs do not overlap
        first[1:] = start[1:] > end[:-1] + _GAP
        last[:-1] = first[1:]
        for a, b in zip(start[first].tolist(), end[last].tolist(), strict=True):
            os.posix_fadvise(self._file.fileno(), a, b - a, os.POSIX_FADV_WILLNEED)

    @property
    def classes(self) -> list[str] | None:
        """Class names by label, from the converter's .json beside the file; None without one."""
        try:
            names = json.loads(sidecar_path(self.path, ".json").read_text(encoding="utf-8"))["classes"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return names if isinstance(names, list) and names else None

    def close(self) -> None:
        """Close the file. Its memory map lives as long as a `Sample.jpeg` in it does; the columns stay."""
        self._bytes = None
        self._file.close()
        if self._map is not None:
            with contextlib.suppress(BufferError):  # views are alive: dropping our reference is enough
                self._map.close()
            self._map = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[Reader], tuple[Path]]:
        return Reader, (self.path,)

    def __repr__(self) -> str:
        return f"Reader({str(self.path)!r}, {len(self)} samples)"


def _sizes(pointer_N: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Length in bytes of the blob at each pointer, 0 where the table does not know it. N samples."""
    # One-worker files list blobs in sample order: no sort for the common case.
    if len(table) == len(pointer_N) and np.array_equal(table["pointer"], pointer_N.view(np.uint64)):
        return table["size"].astype(np.int64)
    if len(table) == 0:
        return np.zeros(len(pointer_N), np.int64)
    order = np.argsort(table["pointer"], kind="stable")
    known = table["pointer"][order].astype(np.int64)
    at = np.minimum(np.searchsorted(known, pointer_N), len(known) - 1)
    return np.where(known[at] == pointer_N, table["size"][order[at]].astype(np.int64), 0)


class Writer:
    """Writes a .beton in one pass: `add` each sample in order, then `commit` (a `with` block does it).

    `extend` takes many samples at a time, for fewer system calls. Records lie before the pages, so the number of
    samples must be bounded in advance: `capacity` records are reserved, and the header counts those really added. Until
    `commit` the file is called `NAME.partial`, locked, and its header says unfinished; whatever is left of a killed run
    is overwritten by the next one. One thread only.

    page_size: bytes, a power of two from 2 MiB to 2 GiB; no blob may be larger.
    Raises UserError for an unusable path, page size or sample; OSError (disk full ...) comes through.
    """

    def __init__(self, path: str | os.PathLike, capacity: int, *, page_size: int = DEFAULT_PAGE_SIZE):
        self.path, self.page_size = Path(path), int(page_size)
        if not MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE or page_size & (page_size - 1):
            raise UserError(f"page size {page_size} is no power of two between 2 MiB and 2 GiB; the default is 8388608")
        if capacity < 1:
            raise UserError(f"{self.path}: there is nothing to write")
        type_ids = (TYPE_IMAGE, TYPE_INT)
        self._records = np.zeros(capacity, _record_dtype(list(type_ids)))
        self._table = np.zeros(capacity, _ALLOCATION)
        self._descriptors = np.zeros(2, _DESCRIPTOR)
        self._descriptors["type_id"] = type_ids
        self._descriptors["name"] = (b"image", b"label")
        records_end = _HEADER.itemsize + self._descriptors.nbytes + self._records.nbytes
        self._first_page = -(-records_end // page_size) * page_size
        self._at = self._first_page  # where the next blob goes
        self._num = 0
        self._partial = partial_path(self.path)
        self._fd = _create_locked(self._partial)  # -1: closed
        try:
            self._write_head(alloc_table_ptr=0)
        except BaseException:  # the caller has nothing to close yet
            self.abort()
            raise

    def __len__(self) -> int:
        return self._num

    @property
    def nbytes(self) -> int:
        """Length of the file if it were committed now."""
        return self._table_start + self._num * self._table.itemsize

    @property
    def _table_start(self) -> int:
        return -(-self._at // self.page_size) * self.page_size

    def add(
        self, blob: bytes | memoryview | np.ndarray, height: int, width: int, label: int, mode: int = MODE_JPEG
    ) -> None:
        """Append one sample: a JPEG stream (mode 0) or height*width*3 raw RGB bytes (mode 1), stored as they are."""
        self.extend([(blob, height, width, label, mode)])

    def extend(self, samples: Iterable[tuple[bytes | memoryview | np.ndarray, int, int, int, int]]) -> None:
        """Append samples, each as the arguments of `add`. Nothing holds on to the blobs afterwards."""
        blobs: list[memoryview] = []
        start = self._at
        try:
            for blob, height, width, label, mode in samples:
                view = (blob.data if isinstance(blob, np.ndarray) else memoryview(blob)).cast("B")
                size = len(view)
                self._check(size, height, width, mode)
                room = self.page_size - self._at % self.page_size
                if size > room:  # never across a page; the tail becomes zeros
                    self._write(blobs, start)
                    start = self._at = self._at + room
                    blobs = []
                blobs.append(view)
                self._records[self._num] = ((mode, width, height, self._at), label)
                self._table[self._num] = (self._num, self._at, size)
                self._at += size
                self._num += 1
        finally:
            self._write(blobs, start)

    def _check(self, size: int, height: int, width: int, mode: int) -> None:
        """Raise UserError for a sample that cannot be stored."""
        if self._num == len(self._records):
            raise UserError(f"{self.path}: more samples than the capacity of {len(self._records)} given at the start")
        if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
            raise UserError(f"{self.path}: {height} x {width} pixels cannot be stored; sides are 1 to {MAX_SIDE}")
        if mode not in (MODE_JPEG, MODE_RAW) or size == 0 or (mode == MODE_RAW and size != height * width * 3):
            raise UserError(f"{self.path}: a blob of {size} bytes is no {height} x {width} image of mode {mode}")
        if size > self.page_size:
            raise UserError(
                f"{self.path}: an image of {size} bytes does not fit a page of {self.page_size}; take larger pages"
            )

    def commit(self) -> None:
        """Write records and table, then the header that makes the file valid, and give it its name."""
        if self._fd < 0:
            raise ValueError(f"{self.path}: already closed")
        if self._num == 0:
            self.abort()
            raise UserError(f"{self.path}: no sample was added")
        try:
            self.flush()
            self._write_head(alloc_table_ptr=self._table_start)
            os.fsync(self._fd)
            os.replace(self._partial, self.path)
            _sync_folder(self.path.parent)
        except BaseException:
            self.abort()
            raise
        os.close(self._fd)
        self._fd = -1

    close = commit

    def flush(self) -> None:
        """Bring all of the file but its header to the disk; `commit` is then quick."""
        self._write([self._table[: self._num].data.cast("B")], self._table_start)
        records_start = _HEADER.itemsize + self._descriptors.nbytes
        self._write([self._records[: self._num].data.cast("B")], records_start)
        os.fsync(self._fd)

    def abort(self) -> None:
        """Remove the unfinished file; nothing happens after `commit`."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        with contextlib.suppress(OSError):
            self._partial.unlink()
        with contextlib.suppress(OSError):
            os.close(fd)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *exc: object) -> None:
        if exc_type is not None:
            self.abort()
        elif self._fd >= 0:
            self.commit()

    def _write_head(self, alloc_table_ptr: int) -> None:
        header = np.zeros((), _HEADER)
        header[()] = (VERSION, len(self._descriptors), self.page_size, self._num, alloc_table_ptr)
        self._write([memoryview(header.tobytes() + self._descriptors.tobytes())], 0)

    def _write(self, blobs: list[memoryview], at: int) -> None:
        """Put the blobs one after another at a place of the file."""
        while blobs:
            written = os.pwritev(self._fd, blobs[:_MAX_BUFFERS], at)  # perhaps less than asked for
            at += written
            whole = 0
            while whole < len(blobs) and written >= len(blobs[whole]):
                written -= len(blobs[whole])
                whole += 1
            blobs = blobs[whole:]
            if written:
                blobs[0] = blobs[0][written:]


def _create_locked(path: Path) -> int:
    """Open `path` for writing, empty, held by an advisory lock: a leftover is taken over, a live one is refused."""
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as e:
            why = f"its folder {path.parent} does not exist" if e.errno == errno.ENOENT else e.strerror
            raise UserError(f"{path} cannot be written: {why}") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise UserError(f"{path} is being written by another process; wait for it or choose another name") from None
        except OSError:
            pass  # a file system without locks
        # Between open and lock the other writer may have renamed or removed what we hold: then it is not ours.
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(fd).st_ino:
                os.ftruncate(fd, 0)
                return fd
        os.close(fd)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
