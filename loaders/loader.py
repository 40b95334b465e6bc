"""Order -> bytes -> backend -> augment, some batches ahead of training.

    feeder thread   order -> draws -> backend.start(job) ..... wait -> (copy, augment on a side stream) -> ready queue
    worker threads                    read, decode, crop (, augment)
    your loop                                                              for batch in loader.epoch(e): ...

Memory is allocated once: a ring of slots, each with room for one batch, goes round between the feeder and the loop.
A batch is therefore valid until the next one is asked for; `clone()` what must live longer.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from loaders import backends
from loaders.augment import DeviceAugment, augment_rows
from loaders.beton import Reader
from loaders.draw import draw
from loaders.errors import UserError
from loaders.job import ON_BAD_SAMPLE, Job
from loaders.order import random_order, sequential, steps_per_epoch
from loaders.stats import Stats
from loaders.views import ViewSpec

ORDERS = ("random", "sequential")


@dataclasses.dataclass
class Batch:
    """B images as K views (a list, because local crops are smaller), normalised, channels last, on the device.

    views   K tensors [B, 3, S_k, S_k]
    tiles   with `divide = n`: K tensors [n*n*B, 3, S_k/n, S_k/n], tile-major, tiles in column-major order; else None
    index   [B] sample ids, int64, on the host
    label   [B] labels, int64, on the host (never used in training)
    """

    views: list[torch.Tensor]
    tiles: list[torch.Tensor] | None
    index: torch.Tensor
    label: torch.Tensor


@dataclasses.dataclass
class _Slot:
    """Memory for one batch."""

    crops: list[torch.Tensor]  # uint8, on the backend's device; pinned if they will be copied to a GPU
    views: list[torch.Tensor] | None  # normalised, where augmentation runs on the host
    copied: torch.cuda.Event | None = None  # the crops have left this slot


def divide(x_B3HW: torch.Tensor, n: int) -> torch.Tensor:
    """Cut images in n x n tiles: [n*n*B, 3, H/n, W/n], tile-major, tiles in column-major order (n = 2: top left,
    bottom left, top right, bottom right), as Fast-MoCo's code does.

    Raises ValueError if n does not divide the sides.
    """
    height, width = x_B3HW.shape[2:]
    if n < 1 or height % n or width % n:
        raise ValueError(f"images of {height} x {width} px cannot be divided {n} x {n}: sides must be multiples of n")
    tiles = [tile for column in x_B3HW.chunk(n, 3) for tile in column.chunk(n, 2)]
    return torch.cat(tiles).contiguous(memory_format=torch.channels_last)


def _empty(batch_size: int, size: int, dtype: torch.dtype, device: torch.device, pin: bool) -> torch.Tensor:
    flat = torch.empty(batch_size, size, size, 3, dtype=dtype, device=device, pin_memory=pin)
    return flat.permute(0, 3, 1, 2)


class Loader:
    """Batches of views from one .beton file. Make one with `loaders.open`."""

    def __init__(
        self,
        reader: Reader,
        spec: ViewSpec,
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
        dtype: torch.dtype = torch.float32,
        on_bad_sample: str = "raise",
        subset: np.ndarray | None = None,
    ):
        if subset is not None and order != "sequential":
            raise ValueError("a subset of the samples goes with sequential order only")
        if order not in ORDERS:
            raise UserError(f"unknown order {order!r}, choose from: {', '.join(ORDERS)}")
        if on_bad_sample not in ON_BAD_SAMPLE:
            raise UserError(f"unknown on_bad_sample {on_bad_sample!r}, choose from: {', '.join(ON_BAD_SAMPLE)}")
        if batch_size < 1 or prefetch < 1 or (workers is not None and workers < 1):
            raise UserError("batch size, prefetch and workers must be at least 1")
        if len(reader) == 0:
            raise UserError(f"{reader.path} holds no sample: convert a folder with images in it")
        if order == "random" and len(reader) < batch_size * world:
            raise UserError(
                f"batch of {batch_size * world} images is larger than {reader.path} ({len(reader)} images): "
                f"use --batch-size {max(1, len(reader) // world)} or less"
            )
        self.reader, self.spec, self.batch_size, self.dtype = reader, spec, batch_size, dtype
        self.device = torch.device(device)
        self.seed, self.rank, self.world, self.order = seed, rank, world, order
        self.on_bad_sample = on_bad_sample
        self.ids = np.arange(len(reader)) if subset is None else np.asarray(subset, dtype=np.int64)
        self.stats = Stats()
        self.backend = backends.load(backend)(
            reader, spec, batch_size=batch_size, device=self.device, workers=workers, stats=self.stats
        )
        self.host_augment = self.backend.device.type == "cpu" and self.device.type == "cpu"
        self.ready_made = getattr(self.backend, "ready_made", False)
        # One batch with the consumer, the others being filled or waiting.
        self.slots = [self._make_slot() for _ in range(prefetch + 1)]
        self.device_augment = None
        if self.device.type == "cuda" and not self.ready_made:
            self.stream = torch.cuda.Stream(self.device)
            self.device_augment = DeviceAugment(spec, self.device, dtype)
        self._running: _Epoch | None = None

    def _make_slot(self) -> _Slot:
        pin = self.device.type == "cuda" and self.backend.device.type == "cpu"
        if self.ready_made:
            generator = torch.Generator().manual_seed(self.seed)
            views = [
                torch.randn(self.batch_size, v.size, v.size, 3, generator=generator).permute(0, 3, 1, 2)
                for v in self.spec.views
            ]
            return _Slot([], [v.to(self.device, self.dtype, memory_format=torch.channels_last) for v in views])
        crops = [_empty(self.batch_size, s, torch.uint8, self.backend.device, pin) for s in self.spec.sizes]
        views = None
        if self.host_augment:
            views = [_empty(self.batch_size, s, self.dtype, self.device, False) for s in self.spec.sizes]
        return _Slot(crops, views)

    def __len__(self) -> int:
        """Batches per epoch and process. Random order drops the last, partial batch."""
        if self.order == "sequential":
            return -(-len(self.ids) // self.batch_size)
        return steps_per_epoch(len(self.reader), self.batch_size, self.world)

    def epoch(self, epoch: int = 0, start_step: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from `start_step` on: the same ones, bit for bit, whenever and wherever it is asked.

        One epoch at a time: asking for another one ends the one before.
        """
        self._stop()
        self._running = running = _Epoch(self, epoch, start_step)
        try:
            yield from running
        finally:
            running.stop()

    def _indices(self, epoch: int, start_step: int) -> Iterator[np.ndarray]:
        if self.order == "sequential":
            batches = sequential(len(self.ids), batch_size=self.batch_size)
            return (self.ids[b] for step, b in enumerate(batches) if step >= start_step)
        return random_order(
            len(self.reader),
            batch_size=self.batch_size,
            seed=self.seed,
            epoch=epoch,
            rank=self.rank,
            world=self.world,
            start_step=start_step,
        )

    def _job(self, slot: _Slot, index_B: np.ndarray, epoch: int) -> Job:
        index_B = np.array(index_B)  # a broken sample may be replaced in it
        num = len(index_B)
        job = Job(
            reader=self.reader,
            spec=self.spec,
            seed=self.seed,
            epoch=epoch,
            index_B=index_B,
            label_B=np.array(self.reader.label[index_B], dtype=np.int64),
            draws=[]
            if self.ready_made
            else draw(
                self.spec,
                seed=self.seed,
                epoch=epoch,
                index_B=index_B,
                height_B=self.reader.height[index_B],
                width_B=self.reader.width[index_B],
            ),
            crops=[c[:num] for c in slot.crops],
            stats=self.stats,
            on_bad_sample=self.on_bad_sample,
        )
        if self.host_augment and not self.ready_made:
            mean, std = self.spec.mean, self.spec.std

            def rows_to_views(rows: range) -> None:
                for crops, draws, view, out in zip(job.crops, job.draws, self.spec.views, slot.views, strict=True):
                    augment_rows(crops, draws, view, mean, std, rows, out)

            job.augment_rows = rows_to_views
        return job

    def _finish(self, slot: _Slot, job: Job) -> list[torch.Tensor]:
        """Crops to views on the device. On the host the workers have done it already."""
        if slot.views is not None:
            return [v[: len(job.index_B)] for v in slot.views]
        start = time.thread_time()
        with torch.cuda.stream(self.stream):
            crops = [c.to(self.device, non_blocking=True) for c in job.crops]
            slot.copied = self.stream.record_event()
            views = self.device_augment(crops, job.draws)
        self.stats.add(copy=time.thread_time() - start)
        return views

    def _stop(self) -> None:
        if self._running is not None:
            self._running.stop()
            self._running = None

    def close(self) -> None:
        """Stop the threads and give the memory back. The reader stays open: it belongs to the caller."""
        self._stop()
        self.backend.close()
        self.slots = []

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Epoch:
    """The feeder thread of one epoch and the queues between it and the consumer."""

    def __init__(self, loader: Loader, epoch: int, start_step: int):
        self.loader, self.epoch, self.start_step = loader, epoch, start_step
        self.free: queue.SimpleQueue[_Slot | None] = queue.SimpleQueue()
        self.ready: queue.SimpleQueue[tuple | BaseException | None] = queue.SimpleQueue()
        for slot in loader.slots:
            self.free.put(slot)
        self.stopping = False
        self.pending: deque[tuple] = deque()
        self.thread = threading.Thread(target=self._feed, name="feeder", daemon=True)
        self.thread.start()

    def __iter__(self) -> Iterator[Batch]:
        loader = self.loader
        while True:
            start = time.perf_counter()
            item = self.ready.get()
            loader.stats.add(wait=time.perf_counter() - start)
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            slot, batch, event = item
            if event is not None:
                stream = torch.cuda.current_stream(loader.device)
                stream.wait_event(event)
                for tensor in batch.views + (batch.tiles or []):
                    tensor.record_stream(stream)
            yield batch
            self.free.put(slot)

    def _feed(self) -> None:
        try:
            if self.loader.device.type == "cuda":
                torch.cuda.set_device(self.loader.device)
            for index_B in self.loader._indices(self.epoch, self.start_step):
                slot = self._next_slot()
                if slot is None:
                    return
                if slot.copied is not None:
                    slot.copied.synchronize()  # this thread waits, not the one that trains
                job = self.loader._job(slot, index_B, self.epoch)
                self.pending.append((slot, job, self.loader.backend.start(job)))
            while self.pending and not self.stopping:
                self._publish()
            self.ready.put(None)
        except BaseException as error:
            self.ready.put(error)
        finally:
            # Nobody may write into a slot after this thread has ended.
            for _, _, work in self.pending:
                try:
                    work.wait()
                except BaseException:
                    continue

    def _next_slot(self) -> _Slot | None:
        """A free slot; finished batches are handed over while there is none. None when stopping."""
        while not self.stopping:
            while self.pending and self.pending[0][2].done():
                self._publish()
            try:
                return self.free.get_nowait()
            except queue.Empty:
                if not self.pending:
                    return self.free.get()
                self._publish()
        return None

    def _publish(self) -> None:
        slot, job, work = self.pending[0]
        work.wait()
        self.pending.popleft()
        loader = self.loader
        views = loader._finish(slot, job)
        event = None
        if loader.device_augment is not None:
            with torch.cuda.stream(loader.stream):
                tiles = self._tiles(views)
                event = loader.stream.record_event()
        else:
            tiles = self._tiles(views)
        batch = Batch(views, tiles, torch.from_numpy(job.index_B), torch.from_numpy(job.label_B))
        self.ready.put((slot, batch, event))

    def _tiles(self, views: list[torch.Tensor]) -> list[torch.Tensor] | None:
        n = self.loader.spec.divide
        return [divide(view, n) for view in views] if n > 1 else None

    def stop(self) -> None:
        """End the thread, whatever it is doing, and wait for work that writes into the slots."""
        self.stopping = True
        self.free.put(None)
        if self.thread is not threading.current_thread():
            self.thread.join()


def open_loader(path: str | Path, views: ViewSpec, **options: object) -> Loader:
    """A loader over the .beton file at `path` that emits `views`.

    Keywords: batch_size (images per process and step), device, backend ("auto" or a name of `backends.available()`),
    seed, rank, world, workers (threads; None: by the machine), prefetch (batches ahead), order ("random", or
    "sequential" for evaluation: every sample once, in file order, last batch short), dtype (of the views),
    on_bad_sample ("raise", or "skip": take the next sample of the file instead), subset (ids, with sequential order).

    Raises UserError for a file that cannot be used and for options that make no sense.
    """
    return Loader(Reader(path), views, **options)
