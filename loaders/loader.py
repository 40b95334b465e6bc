"""Order -> bytes -> backend -> augment, some batches ahead of training.

    feeder thread    order -> read ahead -> draw -> backend.start ... wait -> (copy, augment on a side stream) -> queue
    worker threads                                  read, decode, crop (, augment)
    your loop                                                                        for batch in loader.epoch(e): ...

Memory is allocated once: a ring of slots, each with room for one batch, goes round between the feeder and the loop.
A batch is therefore valid until the next one is asked for; `clone()` what must live longer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from loaders import auto, backends
from loaders.augment import DeviceAugment, divide
from loaders.beton import Reader
from loaders.dataset import Readers, open_data
from loaders.errors import UserError
from loaders.job import ON_BAD_SAMPLE, Job, empty_images
from loaders.machine import default_workers
from loaders.order import page_order, random_order, sequential, steps_per_epoch
from loaders.read_ahead import ReadAhead
from loaders.stats import Stats
from loaders.views import ViewSpec

ORDERS = ("random", "page", "sequential")


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
    views: list[torch.Tensor] | None = None  # normalised, where augmentation runs on the host
    tiles: list[torch.Tensor] | None = None  # likewise, if the method asks for them
    used: tuple[torch.cuda.Event, torch.cuda.Event] | None = None  # begin and end of the device's work on the crops
    job: Job | None = None  # keeps a backend's own crops alive until then


class Loader:
    """Batches of views from one or several .beton files. Make one with `loaders.open`."""

    def __init__(
        self,
        reader: Reader | Readers,
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
        page_window: int = 64,
        dtype: torch.dtype = torch.float32,
        on_bad_sample: str = "raise",
        subset: np.ndarray | None = None,
        views_ahead: bool = True,
    ):
        if subset is not None and order != "sequential":
            raise ValueError("a subset of the samples goes with sequential order only")
        if order not in ORDERS:
            raise UserError(f"unknown order {order!r}, choose from: {', '.join(ORDERS)}")
        if on_bad_sample not in ON_BAD_SAMPLE:
            raise UserError(f"unknown on_bad_sample {on_bad_sample!r}, choose from: {', '.join(ON_BAD_SAMPLE)}")
        if batch_size < 1 or prefetch < 1 or page_window < 1 or (workers is not None and workers < 1):
            raise UserError("batch size, prefetch, page window and workers must be at least 1")
        if len(reader) == 0:
            raise UserError(f"{reader.path} holds no sample: convert a folder with images in it")
        if order != "sequential" and len(reader) < batch_size * world:
            raise UserError(
                f"batch of {batch_size * world} images is larger than {reader.path} ({len(reader)} images): "
                f"use --batch-size {max(1, len(reader) // world)} or less"
            )
        self.reader, self.spec, self.batch_size, self.dtype = reader, spec, batch_size, dtype
        self.device = torch.device(device)
        self.seed, self.rank, self.world, self.order = seed, rank, world, order
        self.page_window, self.on_bad_sample = page_window, on_bad_sample
        self.ids = np.arange(len(reader)) if subset is None else np.asarray(subset, dtype=np.int64)
        self.workers = workers or default_workers(self.device)
        self.stats = Stats()
        self.choice: auto.Choice | None = None  # what `auto` chose, and why
        options = {"batch_size": batch_size, "device": self.device, "workers": self.workers}
        if backend == "auto":
            self.choice = auto.choose(reader, spec, order=order, world=world, **options)
            backend = self.choice.backend
        self.backend = backends.load(backend, self.device)(reader, spec, stats=self.stats, **options)
        self.ready_made = getattr(self.backend, "ready_made", False)
        self.owns_crops = getattr(self.backend, "owns_crops", False)
        self.reads = not self.ready_made and not getattr(self.backend, "in_memory", False)
        self.host_augment = self.device.type == "cpu" and not self.ready_made
        self.augment_pool = None
        if self.host_augment and not getattr(self.backend, "augments", False):
            one_thread = {"initializer": torch.set_num_threads, "initargs": (1,)}
            torch.set_num_threads(torch.get_num_threads())  # a thread's own setting changes the others' default
            self.augment_pool = ThreadPoolExecutor(self.workers, "augment", **one_thread)
        # One batch with the consumer, the others being filled or waiting.
        self.slots = [self._make_slot() for _ in range(prefetch + 1)]
        self.stream = self.device_augment = None
        if self.device.type == "cuda" and not self.ready_made:
            self.stream = torch.cuda.Stream(self.device)
            self.device_augment = DeviceAugment(spec, self.device, dtype)
        # Beside a GPU, crops wait on the host; False: their views are made when the batch is asked for.
        self.late = self.device_augment is not None and not views_ahead
        self._feed: _Feed | None = None
        self.page = reader.page if order == "page" else None

    def _make_slot(self) -> _Slot:
        pin = self.device.type == "cuda" and self.backend.device.type == "cpu"
        if self.ready_made:
            generator = torch.Generator().manual_seed(self.seed)
            views = [
                torch.randn(self.batch_size, v.size, v.size, 3, generator=generator).permute(0, 3, 1, 2)
                for v in self.spec.views
            ]
            views = [v.to(self.device, self.dtype, memory_format=torch.channels_last) for v in views]
            n = self.spec.divide
            return _Slot([], views, [divide(v, n) for v in views] if n > 1 else None)
        slot, n, B = _Slot([]), self.spec.divide, self.batch_size
        if not self.owns_crops:
            slot.crops = [empty_images(B, s, torch.uint8, self.backend.device, pin=pin) for s in self.spec.sizes]
        if self.host_augment:
            slot.views = [empty_images(B, s, self.dtype, self.device) for s in self.spec.sizes]
            if n > 1:
                slot.tiles = [empty_images(n * n * B, s // n, self.dtype, self.device) for s in self.spec.sizes]
        return slot

    def _outputs(self, slot: _Slot, num: int) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
        """The slot's views and tiles of a batch of `num` images."""
        n = self.spec.divide
        return [v[:num] for v in slot.views], [t[: n * n * num] for t in slot.tiles] if slot.tiles else None

    def __len__(self) -> int:
        """Batches per epoch and process. Only sequential order has a last, partial batch."""
        if self.order == "sequential":
            return -(-len(self.ids) // self.batch_size)
        return steps_per_epoch(len(self.reader), self.batch_size, self.world)

    def epoch(self, epoch: int = 0, start_step: int = 0, *, ahead: bool = False) -> Iterator[Batch]:
        """The batches of one epoch from `start_step` on: the same ones, bit for bit, whenever and wherever it is asked.

        One epoch at a time: asking for another one ends the one before. `ahead` says that the next epoch will be asked
        for next: its first batches are then made while the last ones of this epoch are in use.
        """
        if self._feed is None or self._feed.next != (epoch, start_step):
            self._stop()
            self._feed = _Feed(self, epoch, start_step)
        feed = self._feed
        feed.begin(ahead and self.order != "sequential")
        try:
            yield from feed
        finally:
            if feed.next is None:  # left in mid-epoch
                feed.stop()

    def _indices(self, epoch: int, start_step: int) -> Iterator[np.ndarray]:
        if self.order == "sequential":
            batches = sequential(len(self.ids), batch_size=self.batch_size)
            return (self.ids[b] for step, b in enumerate(batches) if step >= start_step)
        common = {"rank": self.rank, "world": self.world, "start_step": start_step}
        common |= {"batch_size": self.batch_size, "seed": self.seed, "epoch": epoch}
        if self.order == "page":
            return page_order(self.page, window=self.page_window, **common)
        return random_order(len(self.reader), **common)

    def _job(self, slot: _Slot, index_B: np.ndarray, epoch: int) -> Job:
        if self.ready_made:  # nothing to draw
            label_B = np.array(self.reader.label[index_B], dtype=np.int64)
            return Job(self.reader, self.spec, self.seed, epoch, np.array(index_B), label_B, [], [], self.stats)
        options = {"seed": self.seed, "epoch": epoch, "on_bad_sample": self.on_bad_sample}
        job = Job.drawn(self.reader, self.spec, index_B, slot.crops, self.stats, **options)
        if self.host_augment:
            job.views, job.tiles = self._outputs(slot, len(index_B))
            job.plan()
        return job

    def _finish(self, slot: _Slot, job: Job) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
        """Crops -> views and tiles on the device, on the current stream. Those made on the host are there already, or
        in a moment."""
        if slot.views is None:
            start = time.thread_time()
            stream = torch.cuda.current_stream(self.device)
            begin = stream.record_event(torch.cuda.Event(enable_timing=True))
            views, tiles = self.device_augment(job.crops, job.draws)
            slot.used = (begin, stream.record_event(torch.cuda.Event(enable_timing=True)))
            self.stats.add(copy=time.thread_time() - start)
            return views, tiles
        if self.augment_pool is not None:
            self._augment(job)
        return self._outputs(slot, len(job.index_B))

    def _augment(self, job: Job) -> None:
        """Augment on the host what a backend has cropped."""

        def work(rows: range) -> None:
            start = time.thread_time()
            job.augment_rows(rows)
            self.stats.add(augment=time.thread_time() - start)

        rows = range(len(job.index_B))
        list(self.augment_pool.map(work, (rows[i : i + 4] for i in range(0, len(rows), 4))))

    def _stop(self) -> None:
        if self._feed is not None:
            self._feed.stop()
            self._feed = None

    def close(self) -> None:
        """Stop the threads and give the memory back. The reader stays open: it belongs to the caller."""
        self._stop()
        self.backend.close()
        if self.augment_pool is not None:
            self.augment_pool.shutdown()
        self.slots = []

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Feed:
    """The feeder thread, which goes from epoch to epoch, and the queues between it and the consumer."""

    def __init__(self, loader: Loader, epoch: int, start_step: int):
        self.loader, self.start = loader, (epoch, start_step)
        self.next: tuple[int, int] | None = self.start  # what the consumer would get next; None in mid-epoch
        self.ahead = False
        self.free: queue.SimpleQueue[_Slot | None] = queue.SimpleQueue()
        self.ready: queue.SimpleQueue[tuple | BaseException | bool] = queue.SimpleQueue()
        for slot in loader.slots:
            self.free.put(slot)
        self.stopping = False
        self.pending: deque[tuple | bool] = deque()  # a truth value: here ends an epoch, and whether another follows
        self.thread = threading.Thread(target=self._run, name="feeder", daemon=True)

    def begin(self, ahead: bool) -> None:
        """The consumer is about to take an epoch, and (`ahead`) will take the next one after it."""
        self.ahead = ahead
        if not self.thread.ident:
            self.thread.start()

    def __iter__(self) -> Iterator[Batch]:
        """The batches of one epoch."""
        loader, (epoch, _) = self.loader, self.next
        self.next = None
        while True:
            start = time.perf_counter()
            item = self.ready.get()
            loader.stats.add(wait=time.perf_counter() - start)
            if isinstance(item, bool):
                self.next = (epoch + 1, 0) if item else None
                return
            if isinstance(item, BaseException):
                raise item
            slot, batch, event = item
            if event is not None:
                stream = torch.cuda.current_stream(loader.device)
                stream.wait_event(event)
                for tensor in batch.views + (batch.tiles or []) + (slot.job.crops if loader.late else []):
                    if tensor.is_cuda:
                        tensor.record_stream(stream)
            if loader.late:
                batch.views, batch.tiles = loader._finish(slot, slot.job)
            yield batch
            if loader.late:  # the caller may still hold the batch while the next one is made
                batch.views = batch.tiles = None
            self.free.put(slot)

    def _run(self) -> None:
        loader = self.loader
        work = self._ordered()
        try:
            with torch.cuda.stream(loader.stream) if loader.stream is not None else contextlib.nullcontext():
                for epoch, index_B in work:
                    if isinstance(index_B, bool):
                        self.pending.append(index_B)
                        continue
                    slot = self._next_slot()
                    if slot is None:
                        return
                    job = loader._job(slot, index_B, epoch)
                    self.pending.append((slot, job, self._start(job)))
                while self.pending and not self.stopping:
                    self._publish()
        except BaseException as error:
            self.ready.put(error)
        finally:
            work.close()
            # Nobody may write into a slot after this thread has ended.
            for item in self.pending:
                with contextlib.suppress(BaseException):
                    if not isinstance(item, bool):
                        item[2].wait()

    def _start(self, job: Job) -> backends.Pending:
        try:
            return self.loader.backend.start(job)
        except Exception as error:
            return _Failed(error)  # its turn comes after the batches before it

    def _work(self) -> Iterator[tuple[int, np.ndarray | bool]]:
        """(epoch, ids of a batch), and at the end of each epoch (epoch, whether another one follows)."""
        epoch, step = self.start
        while True:
            for index_B in self.loader._indices(epoch, step):
                yield epoch, index_B
            more = self.ahead
            yield epoch, more
            if not more:
                return
            epoch, step = epoch + 1, 0

    def _ordered(self) -> Iterator[tuple[int, np.ndarray | bool]]:
        """`_work`, with its bytes asked for some steps ahead."""
        loader = self.loader
        if not loader.reads:
            yield from self._work()
            return
        ahead = ReadAhead(loader.reader, loader.order, batch_size=loader.batch_size, page_window=loader.page_window)
        try:
            yield from ahead.through(self._work())
        finally:
            ahead.close()

    def _next_slot(self) -> _Slot | None:
        """A free slot; finished batches are handed over while there is none. None when stopping."""
        while not self.stopping:
            while self.pending and (isinstance(self.pending[0], bool) or self.pending[0][2].done()):
                self._publish()
            try:
                slot = self.free.get_nowait()
            except queue.Empty:
                if self.pending:
                    self._publish()
                    continue
                slot = self.free.get()
            if slot is not None and slot.used is not None:
                begin, end = slot.used
                end.synchronize()  # this thread waits, not the one that trains
                self.loader.stats.add(device=begin.elapsed_time(end) / 1000)
                slot.used = slot.job = None
            return slot
        return None

    def _publish(self) -> None:
        if isinstance(self.pending[0], bool):
            self.ready.put(self.pending.popleft())
            return
        slot, job, work = self.pending[0]
        work.wait()
        self.pending.popleft()
        loader = self.loader
        slot.job = job
        views, tiles = ([], None) if loader.late else loader._finish(slot, job)
        event = loader.stream.record_event() if loader.stream is not None else None
        batch = Batch(views, tiles, torch.from_numpy(job.index_B), torch.from_numpy(job.label_B))
        self.ready.put((slot, batch, event))

    def stop(self) -> None:
        """End the thread, whatever it is doing, and wait for work that writes into the slots."""
        self.stopping = True
        self.next = None
        self.free.put(None)
        if self.thread.ident and self.thread is not threading.current_thread():
            self.thread.join()


class _Failed:
    """Work that could not begin."""

    def __init__(self, error: Exception):
        self.error = error

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        raise self.error


def open_loader(data: str | os.PathLike, views: ViewSpec, **options: object) -> Loader:
    """A loader over the .beton files that `data` names (`a.beton`, `a.beton,b.beton`, `part-{00..15}.beton`) that emits
    `views`.

    Keywords: batch_size (images per process and step), device, backend ("auto" or a name of `backends.available()`),
    seed, rank, world, workers (threads; None: by the machine), prefetch (batches ahead), order ("random"; "page": page
    by page, shuffled within `page_window` pages, for hard disks and files larger than memory; or "sequential" for
    evaluation: every sample once, in file order, last batch short), dtype (of the views), on_bad_sample ("raise", or
    "skip": take the next sample of the file instead), subset (ids, with sequential order), views_ahead (False: on a GPU
    only the views of the batch in use are there, not those of the next ones: for very large batches).

    Raises UserError for a file that cannot be used and for options that make no sense.
    """
    return Loader(open_data(data), views, **options)
