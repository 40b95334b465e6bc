"""fastssl-convert: any source of images -> one .beton.

Threads read, check and (only where needed) re-encode; the main thread writes in order, so the file does not depend on
the number of threads. The result gets its name when it is whole, and whatever ends the run earlier leaves nothing
behind; kill -9 leaves files called .partial, which the next run overwrites.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import errno
import importlib.metadata
import io
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np
import tyro
from PIL import Image

from loaders import __version__
from loaders.beton import DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE, Writer, partial_path, sidecar_path
from loaders.checks import at_least, need
from loaders.convert.images import MAX_JPEG_SIDE, BadImage, Stored, store
from loaders.convert.sources import Source, open_source
from loaders.draw import permutation
from loaders.errors import UserError
from loaders.help_texts import flowing
from loaders.machine import usable_cores

if TYPE_CHECKING:  # rich is imported where something is shown: `--help` does without
    from rich.table import Table

__all__ = ["ConvertOptions", "Summary", "convert", "main"]

CHUNK_IMAGES, CHUNK_BYTES = 64, 2 << 20  # one task of a thread; large images go one by one, which bounds the memory
CHUNKS_AHEAD = 2  # per thread
# Threads where there is nothing to decode. They hide the latency of the disk: 20,000 files of 110 KB, not in the page
# cache, take 4.9 s with 1, 3.6 with 2, 2.7 with 4; but contend for the interpreter's lock: files of 11 KB, in the page
# cache, take 24, 28 and 34 us each.
READERS = 4
MAX_WORKERS = 4096
DEFAULT_QUALITY = 90
SHUFFLE_STREAM = 2  # of loaders.draw.permutation: 0 and 1 order the epochs of training


@dataclass(frozen=True)
class ConvertOptions:
    """Turn an image folder, archive or data set into one .beton file.

    JPEGs keep their bytes; other images are stored raw (up to 64 x 64) or as JPEG (quality 95, 4:4:4). OUT.json beside
    the file says what is in it, OUT.skipped.csv which images were left out and why.
    """

    src: Annotated[str, tyro.conf.Positional]
    """Image folder (class subfolders or flat), .tar, .tar.gz or .zip of one, the ImageNet archives as published,
    WebDataset shards ('train-{0000..0146}.tar'), torchvision:NAME[:SPLIT], shapes[:N] or shapes-val[:N] (generated).
    Read in place; only a .tar.gz needs its unpacked size on the disk of OUT for the time being."""
    out: Annotated[Path, tyro.conf.Positional]
    """The file to write."""
    max_side: int | None = None
    """Longest side in pixels: larger images are re-encoded to it."""
    quality: int | None = None
    """JPEG quality, 1 to 100, of images made smaller by --max-side; 90 unless given."""
    workers: int | None = None
    """Threads; one per core unless given, 4 with --no-verify."""
    limit: int | None = None
    """Convert only so many images, taken evenly from the whole source."""
    shuffle: bool = False
    """Store the images in random order, the same for the same --seed, so that training can read the file from front to
    back. The source is then read in that order: one seek per image on a hard disk."""
    part: str | None = None
    """I/N: convert only part I of N, counted from 0. The parts 0/16 to 15/16, made on as many machines, are together
    what one run makes, in the same order: --data part-{00..15}.beton. All have all classes."""
    verify: bool = True
    """Decode every JPEG once; --no-verify only reads its markers and looks at its end."""
    strict: bool = False
    """Fail at the first image that cannot be used, instead of skipping it."""
    page_size: int | None = None
    """Bytes of a page of the file, a power of two from 2 MiB; no image may be larger. Unless given 8 MiB, or more
    if an original is larger."""
    subdir: str | None = None
    """Convert only what is below this folder of the source, such as train."""
    devkit: Path | None = None
    """ILSVRC2012_devkit_t12.tar.gz, with the labels of the ImageNet validation images; the one beside SRC unless
    given."""
    root: Path | None = None
    """Where torchvision keeps its data sets; ~/.cache/fastssl/torchvision unless given."""
    seed: int = 0
    """Seed of --shuffle and of generated pictures."""
    overwrite: bool = False
    """Replace OUT if it exists."""


@dataclass
class Summary:
    """Result of a conversion. Sizes in bytes."""

    images: int = 0
    classes: list[str] = field(default_factory=list)
    counts: Counter[int] = field(default_factory=Counter)  # label -> images
    how: Counter[str] = field(default_factory=Counter)  # original, smaller, converted, raw -> images
    smaller_before: int = 0  # files made smaller: their size before and after
    smaller_after: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)  # name, reason
    ignored: int = 0  # files that are no images
    bytes: int = 0
    seconds: float = 0.0


class Skipped(NamedTuple):
    """An image that is left out, and why."""

    name: str
    reason: str


class Done(NamedTuple):
    """An image ready to be written. source_bytes: of its file, 0 if it has none."""

    stored: Stored
    label: int
    source_bytes: int


def convert(config: ConvertOptions, progress: Callable[[int, int], None] | None = None) -> Summary:
    """Convert as `config` says. `progress` is called with (images done, images in all).

    Raises UserError for anything the user can mend; then, as after any other exception, no file is left.
    """
    started = time.monotonic()
    _check_options(config)
    _check_out(config)
    places = {"devkit": config.devkit, "root": config.root, "scratch": config.out.parent}
    with contextlib.closing(open_source(config.src, subdir=config.subdir, seed=config.seed, **places)) as source:
        summary = Summary(classes=source.classes, ignored=source.ignored)
        if config.strict and source.unusable:
            raise UserError("{}: {} (--strict)".format(*source.unusable[0]))
        indices = _select(source, config)
        if _part(config)[0] == 0:  # one of the parts lists what belongs to none
            summary.skipped += source.unusable
        before = len(summary.skipped)
        sizes = source.sizes
        if config.max_side is None:
            _check_space(config.out, sum(sizes[i] for i in indices))
        page_size = config.page_size or _page_size(config, sizes, indices)
        chunks = _process(source, indices, sizes, page_size, config)
        with (
            _postponed() as let_interrupt,
            Writer(config.out, len(indices), page_size=page_size) as writer,
            contextlib.closing(chunks),
        ):
            let_interrupt()  # now there is a writer to clean up
            for chunk in chunks:
                done = [item for item in chunk if isinstance(item, Done)]
                writer.extend((s.blob, s.height, s.width, label, s.mode) for s, label, _ in done)
                for item in done:
                    _count(summary, item)
                skipped = [item for item in chunk if isinstance(item, Skipped)]
                if config.strict and skipped:
                    raise UserError("{}: {} (--strict)".format(*skipped[0]))
                summary.skipped += skipped
                if progress:
                    progress(len(writer) + len(summary.skipped) - before, len(indices))
            if not len(writer):
                last = "{}: {}".format(*summary.skipped[-1])
                raise UserError(f"none of the {len(indices)} images of {config.src} can be used; {last}")
            writer.flush()  # the long wait for the disk, while Ctrl-C still works
            summary.bytes, summary.seconds = writer.nbytes, time.monotonic() - started
            with _uninterrupted():
                _finish(writer, config, summary)
    return summary


def _select(source: Source, config: ConvertOptions) -> list[int]:
    """Indices of the images to convert, in order."""
    indices = np.arange(len(source)) if config.limit is None else np.asarray(source.subset(config.limit))
    if not len(indices):
        raise UserError(f"{config.src} holds no image that has a class")
    if config.shuffle:
        indices = indices[permutation(len(indices), seed=config.seed, epoch=0, stream=SHUFFLE_STREAM)]
    part, num_parts = _part(config)
    chosen = indices[len(indices) * part // num_parts : len(indices) * (part + 1) // num_parts]
    if not len(chosen):
        raise UserError(f"--part {config.part} of {len(indices)} images holds none; make fewer parts")
    return chosen.tolist()


def _part(config: ConvertOptions) -> tuple[int, int]:
    """Number of the part, from 0, and how many there are."""
    if config.part is None:
        return 0, 1
    if not (found := re.fullmatch(r"(\d{1,9})/(\d{1,9})", config.part)):
        raise UserError(f"--part {config.part}: write it as 3/16, which is the fourth of 16 parts")
    part, num_parts = map(int, found.groups())
    if part >= num_parts:
        last = f"0/{num_parts} to {num_parts - 1}/{num_parts}" if num_parts else "0/1 at least"
        raise UserError(f"--part {config.part}: parts are counted from 0, so write {last}")
    return part, num_parts


def _finish(writer: Writer, config: ConvertOptions, summary: Summary) -> None:
    """Give the files their names: all or none, and never OUT beside the summary of another file.

    So OUT, if it is to be replaced, goes before the others come, and comes last: killed in between, it is missing.
    """
    texts = {sidecar_path(config.out, suffix): text for suffix, text in _sidecars(config, summary).items()}
    temporary = {path: partial_path(path) for path in texts}
    try:
        for path, text in texts.items():
            _write(temporary[path], text)
    except BaseException:
        _remove(temporary.values())
        raise
    try:
        config.out.unlink(missing_ok=True)
        for path, text in texts.items():
            if text:
                os.replace(temporary[path], path)
            else:  # nothing to say: what an earlier run said is not true of this one
                _remove([temporary[path], path])
        writer.commit()
    except BaseException:
        _remove([*temporary.values(), *texts])
        raise


def _write(path: Path, text: str) -> None:
    # Names in an archive may be in any encoding.
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _process(
    source: Source, indices: list[int], sizes: Sequence[int], page_size: int, config: ConvertOptions
) -> Generator[list[Done | Skipped], None, None]:
    """Read and prepare the images on threads; yields them in order, a bounded number ahead.

    A chunk is valid until the next is asked for, because its memory is used again. New memory for every image would
    cost more than copying it does (ImageNet originals: 110 us of system time per image, most of it page faults; 55
    without).
    """
    spare: list[memoryview] = []

    def task(chunk: list[int]) -> tuple[list[Done | Skipped], memoryview]:
        buffer = spare.pop() if spare else memoryview(bytearray(CHUNK_BYTES))
        items: list[Done | Skipped] = []
        used = 0
        for i in chunk:
            item = prepare(i, buffer[used:])
            items.append(item)
            if isinstance(item, Done) and isinstance(item.stored.blob, memoryview):
                used += len(item.stored.blob)
        return items, buffer

    def prepare(i: int, buffer: memoryview) -> Done | Skipped:
        try:
            data, label = source.read(i, buffer)
        except OSError as e:
            return Skipped(source.name(i), f"cannot be read: {e.strerror or e}")
        try:
            stored = store(
                data, max_side=config.max_side, quality=config.quality or DEFAULT_QUALITY, verify=config.verify
            )
        except BadImage as e:
            return Skipped(source.name(i), str(e))
        if len(stored.blob) > page_size:
            reason = f"{len(stored.blob)} bytes do not fit a page of {page_size}; --page-size or --max-side helps"
            return Skipped(source.name(i), reason)
        return Done(stored, label, 0 if isinstance(data, Image.Image) else len(data))

    decodes = config.verify or config.max_side is not None
    workers = config.workers or (usable_cores() if decodes else READERS)
    pool = ThreadPoolExecutor(workers, "convert")
    pending: deque[Future] = deque()
    try:
        for chunk in _chunks(indices, sizes):
            pending.append(pool.submit(task, chunk))
            if len(pending) > workers * CHUNKS_AHEAD:
                items, buffer = pending.popleft().result()
                yield items
                spare.append(buffer)
        while pending:
            yield pending.popleft().result()[0]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _chunks(indices: list[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    chunk: list[int] = []
    size = 0
    for i in indices:
        if chunk and (len(chunk) == CHUNK_IMAGES or size + sizes[i] > CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(i)
        size += sizes[i]
    if chunk:
        yield chunk


def _count(summary: Summary, item: Done) -> None:
    summary.images += 1
    summary.counts[item.label] += 1
    summary.how[item.stored.how] += 1
    if item.stored.how == "smaller":
        summary.smaller_before += item.source_bytes
        summary.smaller_after += len(item.stored.blob)


def _check_options(config: ConvertOptions) -> None:
    at_least(config, 1, "max_side", "quality", "workers", "limit")
    at_least(config, 0, "seed")
    need(
        config.max_side is None or config.max_side <= MAX_JPEG_SIDE,
        f"--max-side {config.max_side}: at most {MAX_JPEG_SIDE}",
    )
    need(config.quality is None or config.quality <= 100, f"--quality {config.quality}: at most 100")
    need(config.workers is None or config.workers <= MAX_WORKERS, f"--workers {config.workers}: at most {MAX_WORKERS}")
    need(config.seed < 1 << 32, f"--seed {config.seed}: at most {(1 << 32) - 1}")
    need(
        config.quality is None or config.max_side is not None,
        "--quality is for images made smaller: give --max-side too (originals keep their bytes)",
    )
    _part(config)


def _check_out(config: ConvertOptions) -> None:
    out = config.out
    if not out.parent.is_dir():
        raise UserError(f"the folder {out.parent} of the output does not exist; make it first")
    if out.is_dir():
        raise UserError(f"{out} is a folder; give the name of a file, such as {out / 'train.beton'}")
    if config.overwrite:
        return
    if out.exists():
        raise UserError(f"{out} exists; add --overwrite to replace it, or choose another name")
    beside = sidecar_path(out, ".json")
    if beside.exists() and not _is_ours(beside):
        raise UserError(f"{beside} exists and is no summary of a .beton; choose another name, or add --overwrite")


def _is_ours(path: Path) -> bool:
    try:
        return "fastssl" in json.loads(path.read_text(encoding="utf-8"))["versions"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise UserError(
            f"{out.parent} has {_size(free)} free, and the originals take {_size(needed)}; make room, choose another "
            "disk, or shrink them with --max-side"
        )


def _page_size(config: ConvertOptions, sizes: Sequence[int], indices: list[int]) -> int:
    """Bytes of a page: FFCV's 8 MiB, which suits every common data set; more if a file is larger and will be kept."""
    page_size = DEFAULT_PAGE_SIZE
    if config.max_side is None:
        largest = max(sizes[i] for i in indices)
        while page_size < min(largest, MAX_PAGE_SIZE // 32):  # up to 64 MiB: pages are what FFCV reads at once
            page_size *= 2
    return page_size


def _sidecars(config: ConvertOptions, summary: Summary) -> dict[str, str]:
    """Texts of OUT.json and OUT.skipped.csv; empty where there is nothing to say."""
    counts = [summary.counts[label] for label in range(len(summary.classes))]
    content = {
        "source": config.src,
        "images": summary.images,
        "order": f"shuffled with seed {config.seed}" if config.shuffle else "as in the source",
        "part": config.part,
        "classes": summary.classes,
        "counts": counts or dict(sorted(summary.counts.items())),
        "stored": dict(summary.how),
        "smaller_bytes": {"before": summary.smaller_before, "after": summary.smaller_after},
        "skipped": len(summary.skipped),
        "ignored_files": summary.ignored,
        "bytes": summary.bytes,
        "seconds": round(summary.seconds, 3),
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()},
        "versions": _versions(),
    }
    table = io.StringIO()
    if summary.skipped:
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(("path", "reason"))
        writer.writerows(summary.skipped)
    return {".json": json.dumps(content, indent=1) + "\n", ".skipped.csv": table.getvalue()}


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"fastssl": __version__}
    for name in ("torch", "torchvision", "pillow", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


@contextlib.contextmanager
def _handling(handler: Callable[..., None]) -> Iterator[None]:
    """Let `handler` have Ctrl-C and SIGTERM for a while; Python allows that in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before or signal.SIG_DFL)


def _uninterrupted() -> contextlib.AbstractContextManager[None]:
    """Ignore interruptions while the files get their names: it is too late for them."""
    return _handling(lambda *_: None)


@contextlib.contextmanager
def _postponed() -> Iterator[Callable[[], None]]:
    """Hold Ctrl-C and SIGTERM back until the function that this gives is called."""
    came: list[int] = []
    with contextlib.ExitStack() as handling:
        handling.enter_context(_handling(lambda number, _frame: came.append(number)))

        def let_interrupt() -> None:
            handling.close()
            if came:
                signal.raise_signal(came[0])

        yield let_interrupt


def _terminable() -> contextlib.AbstractContextManager[None]:
    """Turn the first Ctrl-C or SIGTERM into KeyboardInterrupt, and ignore the others: cleaning up goes on."""

    def interrupt(*_: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    return _handling(interrupt)


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.4g} TB"


def _table(config: ConvertOptions, summary: Summary) -> Table:
    from rich.table import Table

    table = Table(title=str(config.out), show_header=False, title_justify="left")
    seconds = max(summary.seconds, 1e-9)
    rows = [("images", f"{summary.images:,}"), ("classes", f"{len(summary.classes):,}" if summary.classes else "none")]
    if config.shuffle:
        rows.append(("order", f"shuffled with seed {config.seed}"))
    if config.part is not None:
        rows.append(("part", f"{config.part}, counted from 0"))
    rows.append(("size", _size(summary.bytes)))
    wording = {"original": "original bytes", "converted": "converted to JPEG", "raw": "stored raw"}
    rows += [(text, f"{summary.how[how]:,}") for how, text in wording.items() if summary.how[how]]
    if config.max_side is not None:
        saved = _size(summary.smaller_before) + " -> " + _size(summary.smaller_after)
        rows.append((f"re-encoded to {config.max_side} px", f"{summary.how['smaller']:,} ({saved})"))
    where = f" (see {sidecar_path(config.out, '.skipped.csv').name})" if summary.skipped else ""
    rows.append(("skipped", f"{len(summary.skipped):,}{where}"))
    if summary.ignored:
        rows.append(("other files ignored", f"{summary.ignored:,}"))
    rows.append(("time", f"{summary.seconds:.1f} s, {summary.images / seconds:,.0f} images/s"))
    for row in rows:
        table.add_row(*row)
    return table


def _run(config: ConvertOptions) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]} images/s"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("listing", total=None, rate="-")
        began = time.monotonic()

        def progress(done: int, total: int) -> None:
            rate = f"{done / max(time.monotonic() - began, 1e-9):,.0f}"
            bar.update(task, description="converting", completed=done, total=total, rate=rate)

        summary = convert(config, progress)
    Console().print(_table(config, summary))


def main(argv: Sequence[str] | None = None) -> int:
    """The console command: 0 when the file is there, 2 with one line on stderr when not, 130 when interrupted."""

    def fail(message: str, status: int = 2) -> int:
        print(f"fastssl-convert: error: {' '.join(message.split())}", file=sys.stderr)
        return status

    # Pillow warns about large pictures and odd EXIF blocks; what matters of it is decided in loaders.convert.images.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    out: Path | None = None
    try:
        config = tyro.cli(flowing(ConvertOptions), prog="fastssl-convert", args=argv)
        out = config.out
        with _terminable():
            _run(config)
    except UserError as e:
        return fail(str(e))
    except KeyboardInterrupt:
        return fail("interrupted; nothing was kept", 130)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            return fail(f"the disk of {out} is full; make room, choose another, or shrink images with --max-side")
        return fail(f"{e.filename or out}: {e.strerror or e}; nothing was kept")
    return 0


if __name__ == "__main__":
    sys.exit(main())
