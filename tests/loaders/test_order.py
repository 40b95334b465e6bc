"""The order of samples is a pure function: whole, resumable, and the same for one process and for many."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaders.errors import UserError
from loaders.order import page_order, random_order, sequential, steps_per_epoch


def batches(n, **kw):
    return list(random_order(n, **{"seed": 0, "epoch": 0} | kw))


@given(n=st.integers(1, 200), batch_size=st.integers(1, 20), epoch=st.integers(0, 5))
def test_every_sample_at_most_once_and_only_the_remainder_is_dropped(n, batch_size, epoch):
    if n < batch_size:
        return
    steps = batches(n, batch_size=batch_size, epoch=epoch)
    seen = np.concatenate(steps)
    assert all(len(step) == batch_size and step.dtype == np.int64 for step in steps)
    assert len(steps) == steps_per_epoch(n, batch_size) == n // batch_size
    assert len(np.unique(seen)) == len(seen) and seen.min() >= 0 and seen.max() < n


@given(n=st.integers(12, 100), per_rank=st.integers(1, 4), world=st.integers(1, 3))
def test_ranks_together_are_one_process_with_the_global_batch(n, per_rank, world):
    whole = batches(n, batch_size=per_rank * world)
    parts = [batches(n, batch_size=per_rank, rank=rank, world=world) for rank in range(world)]
    assert len(whole) == steps_per_epoch(n, per_rank, world)
    for step, of_ranks in zip(whole, zip(*parts, strict=True), strict=True):
        np.testing.assert_array_equal(step, np.concatenate(of_ranks))


@given(start=st.integers(0, 10))
def test_resuming_continues_the_epoch(start):
    whole = batches(101, batch_size=10, epoch=3)
    rest = batches(101, batch_size=10, epoch=3, start_step=start)
    np.testing.assert_array_equal(np.array(whole[start:]).reshape(-1, 10), np.array(rest).reshape(-1, 10))


def test_a_batch_is_the_callers_to_change():
    first, second = random_order(4, batch_size=2, seed=0, epoch=0)
    expected = second.copy()
    first[:] = -1
    np.testing.assert_array_equal(second, expected)


def page_batches(page_N, **kw):
    return list(page_order(np.asarray(page_N), **{"seed": 0, "epoch": 0, "window": 2} | kw))


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    per_rank=st.integers(1, 4),
    world=st.integers(1, 3),
    window=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_page_order_gives_every_rank_as_many_samples_and_none_twice(sizes, per_rank, world, window, epoch):
    page_N = np.repeat(np.arange(len(sizes)) * 7, sizes)  # page numbers have gaps, as in real files
    steps = steps_per_epoch(len(page_N), per_rank, world)
    if steps == 0:
        return
    options = {"batch_size": per_rank, "world": world, "window": window, "epoch": epoch}
    ranks = [page_batches(page_N, rank=rank, **options) for rank in range(world)]
    assert [len(batches) for batches in ranks] == [steps] * world
    seen = np.concatenate([np.concatenate(batches) for batches in ranks])
    assert len(np.unique(seen)) == len(seen) == steps * per_rank * world
    for rank, batches in enumerate(ranks):
        for start in (0, steps // 2, steps):
            rest = page_batches(page_N, rank=rank, start_step=start, **options)
            np.testing.assert_array_equal(np.array(batches[start:]).reshape(-1), np.array(rest).reshape(-1))


def test_page_order_needs_few_pages_at_a_time_and_each_page_once():
    page_N = np.repeat(np.arange(40), 25)
    order = np.concatenate(page_batches(page_N, batch_size=10, window=4))
    windows = page_N[order].reshape(10, 100)  # 4 pages of 25 samples each
    assert all(len(np.unique(window)) == 4 for window in windows)
    assert len({page for window in windows for page in np.unique(window)}) == 40
    assert not np.array_equal(np.sort(windows[0]), windows[0])  # and mixed within


def test_ranks_read_their_own_pages_but_for_the_end():
    sizes = np.random.default_rng(0).integers(20, 30, 64)
    page_N = np.repeat(np.arange(64), sizes)
    ranks = [np.concatenate(page_batches(page_N, batch_size=5, world=2, rank=r, window=8)) for r in range(2)]
    pages = [set(page_N[ids[:-60]].tolist()) for ids in ranks]
    assert not pages[0] & pages[1]


@pytest.mark.parametrize("order", [batches, lambda n, **kw: page_batches(np.repeat(np.arange(8), n // 8), **kw)])
def test_epochs_and_seeds_differ(order):
    orders = [np.concatenate(order(64, batch_size=8, seed=s, epoch=e)) for s in range(3) for e in range(3)]
    assert all((a != b).any() for a, b in itertools.combinations(orders, 2))


def test_sequential_has_all_samples_in_file_order():
    steps = list(sequential(10, 4))
    assert [len(step) for step in steps] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate(steps), np.arange(10))
    assert steps[0].dtype == np.int64


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: random_order(7, batch_size=4, world=2, seed=0, epoch=0), "do not fill one batch"),
        (lambda: random_order(8, batch_size=4, seed=0, epoch=0, start_step=3), "has 2 steps"),
        (lambda: random_order(8, batch_size=4, seed=0, epoch=0, start_step=-1), "start step"),
        (lambda: random_order(8, batch_size=4, seed=-1, epoch=0), "seed"),
        (lambda: random_order(8, batch_size=0, seed=0, epoch=0), "batch size"),
        (lambda: random_order(8, batch_size=4, seed=0, epoch=0, rank=2, world=2), "rank 2 of 2"),
        (lambda: page_order(np.zeros(7), batch_size=8, window=1, seed=0, epoch=0), "do not fill one batch"),
        (lambda: page_order(np.zeros(8), batch_size=8, window=0, seed=0, epoch=0), "page window is 0"),
        (lambda: sequential(0, 4), "empty"),
        (lambda: sequential(4, 0), "batch size"),
    ],
)
def test_an_order_that_cannot_be_made_is_refused_at_once(call, names):
    with pytest.raises(UserError, match=names):
        call()
