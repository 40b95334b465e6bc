"""Reading ahead: the system is asked for the bytes of a batch some steps before a decoder wants them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from loaders.beton import Reader
from loaders.dataset import Readers

Tag = TypeVar("Tag")

# Batches: 256 requests under way at batch 32, which fills the queue of any SSD. Without them each decoding thread waits
# for one image at a time, and the system reads around what it asks for.
STEPS = 8


class ReadAhead:
    """Asks for what comes, in a thread of its own: a request returns once it is in the disk's queue, which may be full.

    In random order it asks for the images alone. In page order it asks for whole pages, each once, a whole window of
    pages in advance: the disk reads the next window while this one is in use.
    """

    def __init__(self, reader: Reader | Readers, order: str, *, batch_size: int, page_window: int):
        self.reader = reader
        self.page = reader.page if order == "page" else None
        self.page_window, self.steps = page_window, STEPS
        if self.page is not None:
            self.steps = page_window * len(reader) // (len(np.unique(self.page)) * batch_size)
        self._asked: set[int] = set()
        self._thread = ThreadPoolExecutor(1, "read-ahead")

    def through(self, work: Iterable[tuple[Tag, np.ndarray | bool]]) -> Iterator[tuple[Tag, np.ndarray | bool]]:
        """Pass on (anything, ids of a batch) `steps` items later; what is no batch goes along."""
        coming: deque[tuple[Tag, np.ndarray | bool]] = deque()
        for item in work:
            if not isinstance(item[1], bool):
                self._ask(item[1])
            coming.append(item)
            if len(coming) > self.steps:
                yield coming.popleft()
        yield from coming

    def _ask(self, index_B: np.ndarray) -> None:
        if self.page is None:
            self._thread.submit(self.reader.will_need, index_B)
            return
        if len(self._asked) > 4 * self.page_window:  # long out of use, and perhaps out of the cache by the next epoch
            self._asked.clear()
        page_B = self.page[index_B].tolist()
        new = index_B[[page not in self._asked for page in page_B]]
        self._asked.update(page_B)
        if len(new):
            self._thread.submit(self.reader.will_need, new, whole_pages=True)

    def close(self) -> None:
        """Forget the requests that have not been made."""
        self._thread.shutdown(wait=True, cancel_futures=True)
