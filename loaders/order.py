"""Orders of samples: pure functions, so resuming in mid-epoch needs two integers (epoch and step).

    random       one permutation of all samples
    page         pages of the file in random order, samples shuffled within a window of pages: a hard disk reads
                 8 MiB at a time, and memory has to hold two windows instead of the file
    sequential   as in the file, for evaluation

N samples, R ranks (processes), S steps, B samples per rank and step, P pages.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from loaders.draw import permutation
from loaders.errors import UserError

_PAGES = 1  # the stream of random numbers that orders pages; the samples' is 0


ORDERS = ("random", "page", "sequential")


class BatchIds(NamedTuple):
    """The samples of one step."""

    epoch: int
    index_B: np.ndarray


@dataclass(frozen=True)
class EpochEnd:
    """The place in a stream of batches where an epoch is over."""

    another: bool
    """The next epoch follows at once."""


class Order:
    """The batches of sample ids that one process has in each epoch.

    n: samples in the data. kind: one of `ORDERS`. page_N: page of each sample, for page order. subset: the ids to go
    through instead of all, in sequential order.
    """

    def __init__(
        self,
        n: int,
        kind: str = "random",
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        page_window: int = 64,
        page_N: np.ndarray | None = None,
        subset: np.ndarray | None = None,
    ):
        self.n, self.kind, self.batch_size, self.seed, self.rank, self.world = n, kind, batch_size, seed, rank, world
        self.page_window, self.page_N = page_window, page_N
        self.ids = np.arange(n) if subset is None else np.asarray(subset, dtype=np.int64)

    def __len__(self) -> int:
        """Batches per epoch. Only sequential order has a last, partial batch."""
        if self.kind == "sequential":
            return -(-len(self.ids) // self.batch_size)
        return steps_per_epoch(self.n, self.batch_size, self.world)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[np.ndarray]:
        """Sample ids of every step from `start_step` on, int64 [batch_size] each."""
        if self.kind == "sequential":
            batches = sequential(len(self.ids), self.batch_size)
            return (self.ids[b] for b in itertools.islice(batches, start_step, None))
        at = {"epoch": epoch, "start_step": start_step, "seed": self.seed, "rank": self.rank, "world": self.world}
        if self.page_N is not None:
            return page_order(self.page_N, batch_size=self.batch_size, window=self.page_window, **at)
        return random_order(self.n, batch_size=self.batch_size, **at)


def steps_per_epoch(n: int, batch_size: int, world: int = 1) -> int:
    """Number of full global batches in n samples; the remainder is left out of the epoch."""
    _check(n, batch_size, rank=0, world=world)
    return n // (batch_size * world)


def random_order(
    n: int, *, batch_size: int, seed: int, epoch: int, rank: int = 0, world: int = 1, start_step: int = 0
) -> Iterator[np.ndarray]:
    """Sample ids of every step from `start_step` on, int64 [batch_size] each: this rank's part of one
    permutation.

    `batch_size` is per rank. The global batch of step s is the slice [s * batch_size * world, ...) of the
    epoch's permutation, and rank r has its r-th part: the parts of all ranks together are the batch of one
    process with `batch_size * world`. Raises UserError if the samples do not fill one global batch or
    `start_step` is too large."""
    num_steps = _num_steps(n, batch_size, rank, world, start_step)
    perm_N = permutation(n, seed=seed, epoch=epoch)
    steps_SRB = perm_N[: num_steps * world * batch_size].reshape(num_steps, world, batch_size)
    return iter(steps_SRB[start_step:, rank].copy())  # a copy of this rank's part: callers may write into it


def page_order(
    page_N: np.ndarray,
    *,
    batch_size: int,
    window: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    world: int = 1,
    start_step: int = 0,
) -> Iterator[np.ndarray]:
    """Sample ids of every step from `start_step` on, int64 [batch_size] each, close together in the file.

    `page_N` is the page that each sample lies in. The pages, in random order, go to the ranks in turn, so that each
    rank reads its own part of the file; a rank shuffles the samples of `window` pages at a time. Pages hold different
    numbers of samples: to give every rank as many steps, the last samples of the ranks that have too many go to
    those that have too few. Raises UserError as `random_order` does."""
    n = len(page_N)
    num_steps = _num_steps(n, batch_size, rank, world, start_step)
    if window < 1:
        raise UserError(f"page window is {window}: give the number of pages to shuffle together, 1 or more")
    _, page_N = np.unique(page_N, return_inverse=True)
    place_P = np.argsort(permutation(int(page_N.max()) + 1, seed=seed, epoch=epoch, stream=_PAGES))
    place_N = place_P[page_N]
    rank_N, turn_N = place_N % world, place_N // world
    shuffle_N = permutation(n, seed=seed, epoch=epoch)
    order_N = np.lexsort((shuffle_N, turn_N // window, rank_N))  # by rank, then window, then at random
    parts = np.split(order_N, np.cumsum(np.bincount(rank_N, minlength=world))[:-1])
    quota = num_steps * batch_size
    spare = np.concatenate([part[quota:] for part in parts])
    taken = sum(max(0, quota - len(part)) for part in parts[:rank])
    own = parts[rank][:quota]
    own = np.concatenate((own, spare[taken : taken + quota - len(own)]))
    return iter(own.reshape(num_steps, batch_size)[start_step:].copy())


def sequential(n: int, batch_size: int) -> Iterator[np.ndarray]:
    """All sample ids in file order, int64, in batches; the last one may be short. For evaluation."""
    _check(n, batch_size, rank=0, world=1)
    return (np.arange(start, min(start + batch_size, n)) for start in range(0, n, batch_size))


def _num_steps(n: int, batch_size: int, rank: int, world: int, start_step: int) -> int:
    _check(n, batch_size, rank, world)
    num_steps = steps_per_epoch(n, batch_size, world)
    if num_steps == 0:
        raise UserError(
            f"{n} samples do not fill one batch of {batch_size} on {world} process(es): lower the batch size"
        )
    if not 0 <= start_step <= num_steps:
        raise UserError(f"start step is {start_step}, but the epoch has {num_steps} steps: same data and batch size?")
    return num_steps


def _check(n: int, batch_size: int, rank: int, world: int) -> None:
    if n < 1:
        raise UserError(f"{n} samples: the data set is empty")
    if batch_size < 1:
        raise UserError(f"batch size is {batch_size}: give 1 or more")
    if not 0 <= rank < world:
        raise UserError(f"rank {rank} of {world} process(es): give 0 <= rank < world")
