"""Augmenters: one of these classes, chosen when a loader is opened, turns the crops of a batch into views.

on the host         InWorkers   the backend's threads, each image while it is in the core's cache
                    InPool      threads of their own, after a backend that only crops
on a GPU            OnDevice    the compiled batch form, on a side stream
nowhere             ReadyMade   synthetic views, made once
                    CropsOnly   the crops are what is wanted
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from loaders.augment import DeviceAugment, divide
from loaders.batch import Slot, Views, empty_images
from loaders.machine import thread_pool
from loaders.stats import Stats
from loaders.views import ViewSpec

_ROWS = 4  # images that a thread of InPool takes at a time


@dataclass(kw_only=True)
class Augmenter:
    """Turns the crops of a batch into views; `finish` is what a class has to define."""

    spec: ViewSpec
    batch_size: int
    device: torch.device
    dtype: torch.dtype
    stats: Stats
    late: bool = False
    """The views are made when the batch is asked for, in the caller's thread; before, only its crops wait."""
    stream: torch.cuda.Stream | None = field(default=None, init=False)
    """The stream on which the device works ahead of training; None: the current one."""

    def slot(self, crops: list[torch.Tensor]) -> Slot:
        """Memory for a batch, around that of its crops."""
        return Slot(crops, [])

    def prepare(self, slot: Slot) -> None:
        """Get ready for the job in a slot, before the backend starts on it."""

    def finish(self, slot: Slot) -> Views:
        """The views and tiles of a slot's job, whose crops are whole; on a device, launched on the current stream."""
        raise NotImplementedError

    def wait(self, slot: Slot) -> None:
        """Block until the device no longer needs the crops of the slot."""

    def close(self) -> None:
        """End the threads."""


class CropsOnly(Augmenter):
    """Hands on the uint8 crops in place of views; crops on a GPU are for its default stream."""

    def finish(self, slot: Slot) -> Views:
        return list(slot.job.crops), None


@dataclass(kw_only=True)
class ReadyMade(Augmenter):
    """Random views that are made once, with each slot."""

    seed: int

    def slot(self, crops: list[torch.Tensor]) -> Slot:
        generator, n = torch.Generator().manual_seed(self.seed), self.spec.divide
        shapes = [(self.batch_size, size, size, 3) for size in self.spec.sizes]
        views = [torch.randn(shape, generator=generator).permute(0, 3, 1, 2) for shape in shapes]
        views = [v.to(self.device, self.dtype, memory_format=torch.channels_last) for v in views]
        return Slot(crops, views, [divide(v, n) for v in views] if n > 1 else None)

    def finish(self, slot: Slot) -> Views:
        return slot.filled()


class InWorkers(Augmenter):
    """Views in the host's memory, where the backend's own threads put them."""

    def slot(self, crops: list[torch.Tensor]) -> Slot:
        B, n, sizes = self.batch_size, self.spec.divide, self.spec.sizes
        views = [empty_images(B, s, self.dtype, self.device) for s in sizes]
        tiles = [empty_images(n * n * B, s // n, self.dtype, self.device) for s in sizes] if n > 1 else None
        return Slot(crops, views, tiles)

    def prepare(self, slot: Slot) -> None:
        slot.job.views, slot.job.tiles = slot.filled()
        slot.job.prepare()

    def finish(self, slot: Slot) -> Views:
        return slot.filled()


@dataclass(kw_only=True)
class InPool(InWorkers):
    """Views in the host's memory, made in threads of this class of what a backend has cropped."""

    workers: int

    def __post_init__(self) -> None:
        self.pool = thread_pool(self.workers, "augment")

    def finish(self, slot: Slot) -> Views:
        def work(rows: range) -> None:
            start = time.thread_time()
            slot.job.augment_rows(rows)
            self.stats.add(augment=time.thread_time() - start)

        rows = range(len(slot.job.index_B))
        list(self.pool.map(work, (rows[i : i + _ROWS] for i in range(0, len(rows), _ROWS))))
        return super().finish(slot)

    def close(self) -> None:
        self.pool.shutdown()


@dataclass(kw_only=True)
class OnDevice(Augmenter):
    """Views in a GPU's memory, made there by its own kernels."""

    def __post_init__(self) -> None:
        self.stream = torch.cuda.Stream(self.device)
        self.augment = DeviceAugment(self.spec, self.device, self.dtype)

    def finish(self, slot: Slot) -> Views:
        start = time.thread_time()
        stream = torch.cuda.current_stream(self.device)
        begin = stream.record_event(torch.cuda.Event(enable_timing=True))
        made = self.augment(slot.job.crops, slot.job.draws)
        slot.used = (begin, stream.record_event(torch.cuda.Event(enable_timing=True)))
        self.stats.add(copy=time.thread_time() - start)
        return made

    def wait(self, slot: Slot) -> None:
        if slot.used is not None:
            begin, end = slot.used
            end.synchronize()  # the producer's thread waits, not the one that trains
            self.stats.add(device=begin.elapsed_time(end) / 1000)
            slot.used = None
            del slot.job  # and with it a backend's own crops
