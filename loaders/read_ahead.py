"""Reading ahead: the system is asked for the bytes of a batch some steps before a decoder wants them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from loaders.dataset import Dataset
from loaders.order import BatchIds, EpochEnd, Order

# Batches: 256 requests under way at batch 32, which fills the queue of any SSD. Without them each decoding thread waits
# for one image at a time, and the system reads around what it asks for.
STEPS = 8


class ReadAhead:
    """Asks for the bytes of the next batches, in a thread of its own: a request waits while the disk's queue is full.

    In random order it asks for the images alone. In page order it asks for whole pages, each once, a whole window of
    pages in advance: the disk reads the next window while this one is in use.
    """

    def __init__(self, reader: Dataset, order: Order):
        self.reader, self.page_N, self.window, self.steps = reader, order.page_N, order.page_window, STEPS
        if self.page_N is not None:
            self.steps = self.window * len(reader) // (len(np.unique(self.page_N)) * order.batch_size)
        self._asked: set[int] = set()
        self._thread = ThreadPoolExecutor(1, "read-ahead")

    def through(self, work: Iterable[BatchIds | EpochEnd]) -> Iterator[BatchIds | EpochEnd]:
        """Pass on what comes, `steps` items later, and ask for the bytes of its batches."""
        coming: deque[BatchIds | EpochEnd] = deque()
        for item in work:
            if isinstance(item, BatchIds):
                self._ask(item.index_B)
            coming.append(item)
            if len(coming) > self.steps:
                yield coming.popleft()
        yield from coming

    def _ask(self, index_B: np.ndarray) -> None:
        if self.page_N is None:
            self._thread.submit(self.reader.will_need, index_B)
            return
        if len(self._asked) > 4 * self.window:  # long out of use, and perhaps out of the cache by the next epoch
            self._asked.clear()
        page_B = self.page_N[index_B].tolist()
        new = index_B[[page not in self._asked for page in page_B]]
        self._asked.update(page_B)
        if len(new):
            self._thread.submit(self.reader.will_need, new, whole_pages=True)

    def close(self) -> None:
        """Forget the requests that have not been made."""
        self._thread.shutdown(wait=True, cancel_futures=True)
