"""Which samples, in which order: pure functions, so resuming in mid-epoch needs two integers (epoch and
step)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from loaders.draw import permutation
from loaders.errors import UserError


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
    _check(n, batch_size, rank, world)
    num_steps = steps_per_epoch(n, batch_size, world)
    if num_steps == 0:
        raise UserError(
            f"{n} samples do not fill one batch of {batch_size} on {world} process(es): lower the batch size"
        )
    if not 0 <= start_step <= num_steps:
        raise UserError(f"start step is {start_step}, but the epoch has {num_steps} steps: same data and batch size?")
    perm_N = permutation(n, seed=seed, epoch=epoch)
    steps_SRB = perm_N[: num_steps * world * batch_size].reshape(num_steps, world, batch_size)
    return iter(steps_SRB[start_step:, rank].copy())  # a copy of this rank's part: callers may write into it


def sequential(n: int, batch_size: int) -> Iterator[np.ndarray]:
    """All sample ids in file order, int64, in batches; the last one may be short. For evaluation."""
    _check(n, batch_size, rank=0, world=1)
    return (np.arange(start, min(start + batch_size, n)) for start in range(0, n, batch_size))


def _check(n: int, batch_size: int, rank: int, world: int) -> None:
    if n < 1:
        raise UserError(f"{n} samples: the data set is empty")
    if batch_size < 1:
        raise UserError(f"batch size is {batch_size}: give 1 or more")
    if not 0 <= rank < world:
        raise UserError(f"rank {rank} of {world} process(es): give 0 <= rank < world")
