"""Order -> bytes -> backend -> augmenter, some batches ahead of training.

    producer thread  order -> read ahead -> draw -> backend.start ... wait -> (copy, augment on a side stream) -> queue
    worker threads                                  read, decode, crop (, augment)
    your loop                                                                        for batch in loader.epoch(e): ...

A batch is valid until the next one is asked for, because its memory is used again; `clone()` what must live longer.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
import torch

from loaders import auto, backends
from loaders.augmenter import Augmenter, CropsOnly, InPool, InWorkers, OnDevice, ReadyMade
from loaders.batch import Batch
from loaders.checks import at_least, need
from loaders.dataset import Dataset, open_data
from loaders.errors import unknown
from loaders.job import ON_BAD_SAMPLE
from loaders.machine import default_workers
from loaders.order import ORDERS, Order
from loaders.producer import Producer
from loaders.stats import Stats
from loaders.views import ViewSpec

__all__ = ["Batch", "Loader", "Memory"]


@dataclass(frozen=True)
class Memory:
    """Memory that a loader holds."""

    batches: int
    """Batches of views at a time: in use, ready, or being made."""
    crops: int
    """Bytes of the crops from which views are made."""
    decoded: int
    """Bytes of images that were decoded beforehand."""


class Loader:
    """Batches of views from one or several .beton files.

    data          path (`a.beton`, `a.beton,b.beton`, `part-{00..15}.beton`) or an open reader
    views         the views to make of every image
    batch_size    images per process and step
    device        device of the views
    backend       "auto" or a name of `backends.available()`
    seed          seed of the order and of all draws
    rank, world   number of this process, and number of processes
    workers       threads; by the machine unless given
    prefetch      batches made ahead
    order         "random"; "page": page by page, shuffled within `page_window` pages, for hard disks and files larger
                  than memory; "sequential", for evaluation: every sample once, in file order, the last batch short
    dtype         of the views
    on_bad_sample "raise", or "skip": take the next sample of the file instead
    subset        ids, with sequential order: go through these alone
    views_ahead   False: on a GPU only the views of the batch in use are there, not those of the next ones, for very
                  large batches
    augment       False: batches hold the uint8 crops in place of views

    Raises UserError for a file that cannot be used and for options that make no sense.
    """

    def __init__(
        self,
        data: str | os.PathLike | Dataset,
        views: ViewSpec,
        *,
        batch_size: int,
        device: torch.device | str = "cpu",
        backend: str = "auto",
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int | None = None,
        prefetch: int = 3,
        order: str = "random",
        page_window: int = 64,
        dtype: torch.dtype = torch.float32,
        on_bad_sample: str = "raise",
        subset: np.ndarray | None = None,
        views_ahead: bool = True,
        augment: bool = True,
    ):
        reader = open_data(data) if isinstance(data, (str, os.PathLike)) else data
        self.reader, self.spec, self.batch_size, self.dtype = reader, views, batch_size, dtype
        self.device = torch.device(device)
        self.workers = default_workers(self.device) if workers is None else workers
        self.prefetch, self.page_window = prefetch, page_window
        at_least(self, 1, "batch_size", "prefetch", "page_window", "workers")
        for what, value, choices in (("order", order, ORDERS), ("on_bad_sample", on_bad_sample, ON_BAD_SAMPLE)):
            if value not in choices:
                raise unknown(what, value, choices)
        need(subset is None or order == "sequential", "a subset of the samples goes with sequential order only")
        need(len(reader) > 0, f"{reader.path} holds no sample: convert a folder with images in it")
        need(
            order == "sequential" or len(reader) >= batch_size * world,
            f"batch of {batch_size * world} images is larger than {reader.path} ({len(reader)} images): "
            f"use --batch-size {max(1, len(reader) // world)} or less",
        )
        self.stats = Stats()
        self.choice: auto.Choice | None = None  # what `auto` chose, and why
        if backend == "auto":
            self.choice = auto.choose(
                reader, views, batch_size=batch_size, device=self.device, workers=self.workers, order=order, world=world
            )
            backend = self.choice.backend
        self.backend = backends.load(backend, self.device)(
            reader, views, batch_size=batch_size, device=self.device, workers=self.workers, stats=self.stats
        )
        self.producer = Producer(
            Order(
                len(reader),
                order,
                batch_size=batch_size,
                seed=seed,
                rank=rank,
                world=world,
                page_window=page_window,
                page_N=reader.page if order == "page" else None,
                subset=subset,
            ),
            self.backend,
            self._augmenter(seed, augment=augment, late=not views_ahead),
            num_slots=prefetch + 1,  # one batch with the caller, the others being filled or waiting
            on_bad_sample=on_bad_sample,
        )

    def _augmenter(self, seed: int, *, augment: bool, late: bool) -> Augmenter:
        """The augmenter that turns this backend's crops into views on this device."""
        kind: Callable[..., Augmenter] = InWorkers
        if self.backend.ready_made:
            kind = functools.partial(ReadyMade, seed=seed)
        elif not augment:
            kind = CropsOnly
        elif self.device.type == "cuda":
            kind = functools.partial(OnDevice, late=late)
        elif not self.backend.augments:
            kind = functools.partial(InPool, workers=self.workers)
        return kind(spec=self.spec, batch_size=self.batch_size, device=self.device, dtype=self.dtype, stats=self.stats)

    def __len__(self) -> int:
        """Batches per epoch and process. Only sequential order has a last, partial batch."""
        return len(self.producer.order)

    def epoch(self, epoch: int = 0, start_step: int = 0, *, ahead: bool = False) -> Generator[Batch, None, None]:
        """The batches of one epoch from `start_step` on, the same ones, bit for bit, at every call.

        One epoch at a time: a call for another epoch ends the one before. `ahead` says that the next call will be for
        the epoch after this one, whose first batches are then made while the last ones of this epoch are in use.
        """
        return self.producer.epoch(epoch, start_step, ahead=ahead)

    def endless(self) -> Generator[Batch, None, None]:
        """The batches of one epoch after another, without end."""
        return self.producer.endless()

    @property
    def num_slots(self) -> int:
        """Batches for which there is memory."""
        return len(self.producer.slots)

    def memory(self) -> Memory:
        """Memory that the loader holds at the moment."""
        slots = self.producer.slots
        crops = sum(crop.numel() * crop.element_size() for slot in slots for crop in slot.crops)
        batches = 1 if self.producer.augmenter.late else max(1, len(slots))
        return Memory(batches, crops, self.backend.decoded_bytes())

    def close(self) -> None:
        """Stop the threads and give the memory back. The reader stays open: it belongs to the caller."""
        self.producer.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
