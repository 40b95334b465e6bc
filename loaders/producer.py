"""The thread that makes batches ahead of training, and the memory that it makes them in.

A ring of slots, each with room for one batch, goes round: free -> filled by the backend -> finished by the augmenter ->
with the caller -> free. Memory is allocated once.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator

import torch

from loaders.augmenter import Augmenter
from loaders.backends.base import Backend, Failed
from loaders.batch import Batch, Slot, empty_images
from loaders.job import Job
from loaders.order import BatchIds, EpochEnd, Order
from loaders.read_ahead import ReadAhead


class _Run:
    """One life of the thread: from a step of an epoch on, from epoch to epoch, until it is stopped.

    Each has queues of its own, so that what is left of an earlier run cannot disturb it.
    """

    def __init__(self, slots: list[Slot], epoch: int, start_step: int):
        self.start = (epoch, start_step)
        self.next: tuple[int, int] | None = self.start  # what the caller would get next; None in mid-epoch
        self.ahead = False  # the caller will take the epoch after this one
        self.stopping = False
        self.free: queue.SimpleQueue[Slot | None] = queue.SimpleQueue()
        self.ready: queue.SimpleQueue[Slot | EpochEnd | BaseException] = queue.SimpleQueue()
        self.pending: deque[Slot | EpochEnd] = deque()  # in the hands of the backend
        self.thread: threading.Thread | None = None
        for slot in slots:
            self.free.put(slot)

    def stop(self) -> None:
        """End the thread, whatever it is doing, and wait for work that writes into the slots."""
        self.stopping, self.next = True, None
        self.free.put(None)
        if self.thread is not None and self.thread is not threading.current_thread():
            self.thread.join()


class Producer:
    """Makes the batches of `order`, with one backend and one augmenter, `num_slots` at a time."""

    def __init__(
        self, order: Order, backend: Backend, augmenter: Augmenter, *, num_slots: int, on_bad_sample: str = "raise"
    ):
        self.order, self.backend, self.augmenter, self.on_bad_sample = order, backend, augmenter, on_bad_sample
        self.slots = [augmenter.slot(self._crops()) for _ in range(num_slots)]
        self._run: _Run | None = None

    def _crops(self) -> list[torch.Tensor]:
        """Memory for the crops of one batch."""
        backend, device = self.backend, self.backend.device
        if backend.owns_crops or backend.ready_made:
            return []
        pin = self.augmenter.device.type == "cuda" and device.type == "cpu"
        return [empty_images(self.order.batch_size, s, torch.uint8, device, pin=pin) for s in backend.spec.sizes]

    @property
    def thread(self) -> threading.Thread | None:
        """The thread at work, if any."""
        return self._run.thread if self._run else None

    # --- The caller's side

    def epoch(self, epoch: int, start_step: int, *, ahead: bool) -> Generator[Batch, None, None]:
        """The batches of one epoch; `ahead`: go on with the next epoch while the last ones of this are in use."""
        if self._run is None or self._run.next != (epoch, start_step):
            self.stop()
            self._run = _Run(self.slots, epoch, start_step)
        run = self._run
        run.ahead = ahead and self.order.kind != "sequential"
        if run.thread is None:
            run.thread = threading.Thread(target=self._work, args=(run,), name="producer", daemon=True)
            run.thread.start()
        run.next = None
        try:
            while not isinstance(item := self._next_item(run), EpochEnd):
                yield self._received(item)
                if self.augmenter.late:  # the caller may still hold the batch while the next one is made
                    item.batch.views, item.batch.tiles = [], None
                run.free.put(item)
            run.next = (epoch + 1, 0) if item.another else None
        finally:
            if run.next is None:  # left in mid-epoch, or no other epoch follows
                run.stop()

    def endless(self) -> Generator[Batch, None, None]:
        """The batches of one epoch after another, without end."""
        for epoch in itertools.count():
            yield from self.epoch(epoch, 0, ahead=True)

    def _next_item(self, run: _Run) -> Slot | EpochEnd:
        start = time.perf_counter()
        item = run.ready.get()
        self.backend.stats.add(wait=time.perf_counter() - start)
        if isinstance(item, BaseException):
            raise item
        return item

    def _received(self, slot: Slot) -> Batch:
        """The batch in a slot, safe to use on the caller's stream."""
        batch, late = slot.batch, self.augmenter.late
        if slot.event is not None:
            stream = torch.cuda.current_stream(self.augmenter.device)
            stream.wait_event(slot.event)
            for tensor in [*batch.views, *(batch.tiles or []), *(slot.job.crops if late else [])]:
                if tensor.is_cuda:
                    tensor.record_stream(stream)
        if late:
            batch.views, batch.tiles = self.augmenter.finish(slot)
        return batch

    def stop(self) -> None:
        """End the thread; the next epoch begins anew."""
        if self._run is not None:
            self._run.stop()
            self._run = None

    def close(self) -> None:
        """End all threads and give the memory back."""
        self.stop()
        self.backend.close()
        self.augmenter.close()
        self.slots = []

    # --- The thread's side

    def _work(self, run: _Run) -> None:
        stream, coming = self.augmenter.stream, self._coming(run)
        try:
            with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
                for ids in coming:
                    if isinstance(ids, EpochEnd):
                        run.pending.append(ids)
                        continue
                    slot = self._free_slot(run)
                    if slot is None:
                        return
                    self._start(slot, ids)
                    run.pending.append(slot)
                while run.pending and not run.stopping:
                    self._publish(run)
        except BaseException as error:
            run.ready.put(error)
        finally:
            coming.close()
            # Nobody may write into a slot after this thread has ended.
            for item in run.pending:
                with contextlib.suppress(BaseException):
                    if isinstance(item, Slot):
                        item.work.wait()

    def _coming(self, run: _Run) -> Generator[BatchIds | EpochEnd, None, None]:
        """The samples of every step; their bytes are asked for some steps ahead."""

        def steps() -> Iterator[BatchIds | EpochEnd]:
            start_step = run.start[1]
            for epoch in itertools.count(run.start[0]):
                for index_B in self.order.epoch(epoch, start_step):
                    yield BatchIds(epoch, index_B)
                end, start_step = EpochEnd(another=run.ahead), 0
                yield end
                if not end.another:
                    return

        if self.backend.ready_made or self.backend.in_memory:
            yield from steps()
            return
        with contextlib.closing(ReadAhead(self.backend.reader, self.order)) as ahead:
            yield from ahead.through(steps())

    def _free_slot(self, run: _Run) -> Slot | None:
        """A free slot; finished batches are handed over while there is none. None when stopping."""
        while not run.stopping:
            while run.pending and (isinstance(run.pending[0], EpochEnd) or run.pending[0].work.done()):
                self._publish(run)
            try:
                slot = run.free.get_nowait()
            except queue.Empty:
                if run.pending:
                    self._publish(run)
                    continue
                slot = run.free.get()
            if slot is not None:
                self.augmenter.wait(slot)
            return slot
        return None

    def _start(self, slot: Slot, ids: BatchIds) -> None:
        """Begin a batch in a slot."""
        backend = self.backend
        slot.job = Job(
            backend.reader,
            backend.spec,
            ids.index_B,
            slot.crops,
            backend.stats,
            seed=self.order.seed,
            epoch=ids.epoch,
            on_bad_sample=self.on_bad_sample,
            ready_made=backend.ready_made,
        )
        self.augmenter.prepare(slot)
        try:
            slot.work = backend.start(slot.job)
        except Exception as error:
            slot.work = Failed(error)

    def _publish(self, run: _Run) -> None:
        """Hand the oldest batch over to the caller, once it is whole."""
        item = run.pending[0]
        if isinstance(item, Slot):
            item.work.wait()
            views, tiles = ([], None) if self.augmenter.late else self.augmenter.finish(item)
            stream, job = self.augmenter.stream, item.job
            item.event = stream.record_event() if stream is not None else None
            item.batch = Batch(views, tiles, torch.from_numpy(job.index_B), torch.from_numpy(job.label_B))
        run.ready.put(item)
        run.pending.popleft()
