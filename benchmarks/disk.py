"""The orders of samples: how well they mix, and how fast a cold disk serves them.

    python -m benchmarks.disk --data TRAIN.beton [--page-windows 16 64 256] [--images 4096] [--repeats 5] [--json FILE]

Mixing: the entropy of the labels in a batch, in bits, on the file itself and on a file like ImageNet (1.28 million
images of 110 KB sorted by class), against an order that is random throughout. A class-sorted file read in its own order
has 0 bits: batches of one class.

Disk: the bytes of so many images are read with the system's cache of the file dropped before, by as many threads as the
loader would decode with and nothing else: random and page order, with the loader's reading ahead and without it, and in
file order. On a disk whose own host caches it, these figures say little about other disks.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
import mmap
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from benchmarks.common import (
    CommonOptions,
    Report,
    Run,
    chosen,
    drop_cache,
    figure,
    interleave,
    main,
    ratio,
    spread,
    table,
    timed,
)
from loaders.beton import Reader
from loaders.checks import need
from loaders.order import BatchIds, EpochEnd, Order, page_order, random_order, sequential
from loaders.read_ahead import ReadAhead

CONTESTANTS = ("random", "random, no read-ahead", "page", "page, no read-ahead", "sequential")


@dataclass(kw_only=True)
class DiskOptions(CommonOptions):
    """Options."""

    images: int = 4096
    """Images read per round."""
    workers: tuple[int, ...] = (4,)
    """Threads that read."""
    page_windows: tuple[int, ...] = (16, 64, 256)
    """Pages shuffled together; the disk is measured with the first one."""


# --- Mixing -----------------------------------------------------------------------------------------------------------


def batch_entropy(batches: Iterable[np.ndarray], label_N: np.ndarray) -> float:
    """Mean entropy of the labels in a batch, bits."""

    def entropy(labels: np.ndarray) -> float:
        share = np.unique(labels, return_counts=True)[1] / len(labels)
        return float(-(share * np.log2(share)).sum())

    return float(np.mean([entropy(label_N[batch]) for batch in batches]))


def imagenet_like(num_classes: int = 1000, per_class: int = 1281, per_page: int = 76) -> tuple[np.ndarray, np.ndarray]:
    """Labels and page numbers of a file of ImageNet's size, sorted by class: 8 MiB pages of 110 KB images."""
    label_N = np.repeat(np.arange(num_classes), per_class)
    return label_N, np.arange(len(label_N)) // per_page


def mixing(config: DiskOptions) -> tuple[list[dict], Table]:
    """Entropy per batch for each order, on the file and on one like ImageNet."""
    with Reader(config.data) as reader:
        files = {config.data.name: (reader.label, reader.page), "like ImageNet": imagenet_like()}
    entropy = {}
    for name, (label_N, page_N) in files.items():
        by_class = np.argsort(label_N, kind="stable")  # what a folder's converter writes without --shuffle
        label_N, n = label_N[by_class], len(label_N)
        options = {"batch_size": config.batch_size, "seed": 0, "epoch": 0}
        orders = {"random": random_order(n, **options)}
        orders |= {f"page, window {w}": page_order(page_N, window=w, **options) for w in config.page_windows}
        orders["file order, sorted by class"] = sequential(n, config.batch_size)
        some = 2000  # batches say enough
        entropy[name] = {k: batch_entropy(itertools.islice(o, some), label_N) for k, o in orders.items()}
    rows = [{"order": order, "entropy_bits": {name: entropy[name][order] for name in files}} for order in orders]
    columns = {name: lambda row, name=name: row["entropy_bits"][name] for name in files}
    title = f"class entropy of a batch of {config.batch_size}, bits"
    return rows, table(title, rows, {"order": "order"} | columns)


# --- Disk -------------------------------------------------------------------------------------------------------------


def cached_share(path: Path) -> float:
    """The part of a file that lies in the system's cache."""
    size = path.stat().st_size
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ) as view:
        pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        address = np.frombuffer(view, np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mincore(
            ctypes.c_void_p(address.ctypes.data), ctypes.c_size_t(size), pages.ctypes.data_as(ctypes.c_char_p)
        ):
            raise OSError(ctypes.get_errno(), "mincore")
        del address
    return float((pages & 1).mean())


def read(name: str, config: DiskOptions, epoch: int) -> None:
    """Copy the bytes of one round's images out of the file, as the loader's threads do it."""
    kind, _, without = name.partition(", ")
    with Reader(config.data) as reader, ThreadPoolExecutor(config.workers[0]) as pool:
        page_N = reader.page if kind == "page" else None
        options = {"page_N": page_N, "page_window": config.page_windows[0]}
        order = Order(len(reader), kind, batch_size=config.batch_size, **options)
        batches = itertools.islice(order.epoch(epoch), config.images // config.batch_size)
        work: Iterable[BatchIds | EpochEnd] = (BatchIds(epoch, index_B) for index_B in batches)
        with contextlib.ExitStack() as stack:
            if kind != "sequential" and not without:
                work = stack.enter_context(contextlib.closing(ReadAhead(reader, order))).through(work)
            for ids in work:
                if isinstance(ids, BatchIds):
                    list(pool.map(lambda i: np.array(reader[i].jpeg), ids.index_B.tolist()))


def cold(name: str, config: DiskOptions) -> Callable[[int], Run]:
    """A contestant whose rounds begin with a cold cache; dropping it is not timed."""
    run = timed(lambda epoch: read(name, config, epoch))

    def dropped(epoch: int) -> Run:
        drop_cache(config.data)
        return run(epoch)

    return dropped


def measure(config: DiskOptions) -> Report:
    """Mixing of the orders, and speed of a cold disk under each of them."""
    need(min(config.page_windows, default=0) >= 1, "--page-windows needs values of 1 or more")
    rows, mixed = mixing(config)
    with Reader(config.data) as reader:
        config = dataclasses.replace(config, images=min(config.images, len(reader)))
        mb_per_image = float(reader.size.mean()) / 1e6
    drop_cache(config.data)
    left = cached_share(config.data)
    names = chosen(CONTESTANTS, config)
    runs = interleave({name: cold(name, config) for name in names}, config.repeats, warm=True)
    rates = {n: [config.images / r.elapsed_s for r in runs[n]] for n in names}
    plain = rates.get("random, no read-ahead")
    cold_rows = [
        {
            "order": name,
            "cold_images_per_s": figure(values),
            "of_random_without_read_ahead": ratio(values, plain) if plain else None,
        }
        for name, values in rates.items()
    ]
    shown = table(
        f"cold reads of {config.data.name}, {config.workers[0]} threads, {mb_per_image * 1000:.0f} KB per image "
        f"({100 * left:.0f} % still cached after dropping)",
        cold_rows,
        {
            "order": "order",
            "images/s": "cold_images_per_s",
            "spread": lambda row: spread(row["cold_images_per_s"]),
            "MB/s": lambda row: row["cold_images_per_s"]["median"] * mb_per_image,
            "x random, no read-ahead": "of_random_without_read_ahead",
        },
    )
    return Report(rows + cold_rows, [mixed, shown], {}, {"cached_after_dropping": left, "mb_per_image": mb_per_image})


if __name__ == "__main__":
    sys.exit(main("disk", DiskOptions, measure))
