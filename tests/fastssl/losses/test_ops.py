"""fastssl.losses.ops: the pure functions against their definitions, and their gradients against finite differences."""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastssl.losses.ops import (
    combine,
    cross_entropy,
    divide,
    feature_std,
    info_nce,
    info_nce_queue,
    mean_of_others,
    negative_cosine,
    others,
    own,
    pair_loss,
    sinkhorn,
    subsets,
)

quick = settings(deadline=None, max_examples=30)
SEEDS = st.integers(0, 2**16)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------ mean of the others


@quick
@given(K=st.integers(2, 8), B=st.integers(1, 5), D=st.integers(1, 16), seed=SEEDS)
def test_mean_of_others_is_the_mean_of_the_others(K: int, B: int, D: int, seed: int) -> None:
    z = normal(K, B, D, seed=seed)
    expected = torch.stack([torch.stack([z[j] for j in range(K) if j != i]).mean(0) for i in range(K)])
    torch.testing.assert_close(mean_of_others(z), expected)


def test_mean_of_others_is_exactly_the_other_one_of_two_views() -> None:
    z = torch.randn(2, 7, 5) * torch.tensor([1e6, 1e-6])[:, None, None]
    assert torch.equal(mean_of_others(z), torch.stack([z[1], z[0]]))
    with pytest.raises(ValueError, match="at least 2"):
        mean_of_others(z[:1])


# ------------------------------------------------------------------ distances


def test_negative_cosine() -> None:
    p, t = torch.randn(6, 9), torch.randn(6, 9)
    expected = -(p * t).sum(1) / (p.norm(dim=1) * t.norm(dim=1))
    torch.testing.assert_close(negative_cosine(p, t), expected)
    torch.testing.assert_close(negative_cosine(p, 3 * p), -torch.ones(6))


@quick
@given(M=st.integers(1, 3), B=st.integers(1, 5), N=st.integers(5, 9), seed=SEEDS, temperature=st.floats(0.05, 2))
def test_info_nce_is_its_equation(M: int, B: int, N: int, seed: int, temperature: float) -> None:
    q, k = normal(M, B, 4, seed=seed), normal(N, 4, seed=seed + 1)
    positives = torch.randperm(N, generator=torch.Generator().manual_seed(seed))[:B]
    loss = info_nce(q, k, temperature, positives)
    for m, b in itertools.product(range(M), range(B)):
        logits = torch.stack([F.cosine_similarity(q[m, b], key, dim=0) for key in k]) / temperature
        torch.testing.assert_close(loss[m, b], F.cross_entropy(logits[None], positives[b : b + 1]))


@quick
@given(M=st.integers(1, 3), B=st.integers(1, 5), Q=st.integers(1, 9), seed=SEEDS, temperature=st.floats(0.05, 2))
def test_info_nce_queue_is_its_equation(M: int, B: int, Q: int, seed: int, temperature: float) -> None:
    q, k, queue = normal(M, B, 4, seed=seed), normal(B, 4, seed=seed + 1), F.normalize(normal(Q, 4, seed=seed + 2))
    loss = info_nce_queue(q, k, queue, temperature)
    for m, b in itertools.product(range(M), range(B)):
        keys = torch.cat([k[b : b + 1], queue])
        logits = torch.stack([F.cosine_similarity(q[m, b], key, dim=0) for key in keys]) / temperature
        torch.testing.assert_close(loss[m, b], F.cross_entropy(logits[None], torch.tensor([0])))


def test_contrastive_losses_at_chance_and_at_low_temperature() -> None:
    ones, own_rows = torch.ones(8, 4), torch.arange(8)
    assert info_nce(ones, ones, 0.1, own_rows).tolist() == pytest.approx([math.log(8)] * 8)
    queue = F.normalize(torch.ones(31, 4), dim=1)
    assert info_nce_queue(ones, ones, queue, 0.1).tolist() == pytest.approx([math.log(32)] * 8)
    # exp(1 / T) itself has no fp32 number.
    assert info_nce(-torch.eye(8), torch.eye(8), 0.002, own_rows).tolist() == pytest.approx([500 + math.log(7)] * 8)
    same = torch.eye(4)  # every key is also in the queue
    assert info_nce_queue(same, same, same, 0.002).tolist() == pytest.approx([math.log(2)] * 4, rel=1e-5)
    assert info_nce(same, same, 0.002, torch.arange(4)).tolist() == pytest.approx([0] * 4, abs=1e-5)


def test_cross_entropy_of_two_distributions() -> None:
    t, logits = torch.softmax(torch.randn(3, 5, 7), -1), torch.randn(3, 5, 7)
    expected = F.cross_entropy(logits.flatten(0, 1), t.flatten(0, 1), reduction="none")
    torch.testing.assert_close(cross_entropy(torch.log_softmax(logits, -1), t).flatten(), expected)


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "negative_cosine": negative_cosine,
    "info_nce": functools.partial(info_nce, temperature=0.2, positives=torch.arange(4)),
    "info_nce_queue": functools.partial(info_nce_queue, queue_QD=F.normalize(normal(6, 5), dim=1), temperature=0.2),
    "cross_entropy": lambda p, t: cross_entropy(torch.log_softmax(p, -1), torch.softmax(t, -1)),
}
each_distance = pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES.keys())


@each_distance
def test_distances_are_fp32_under_autocast(distance: Callable) -> None:
    p, t = torch.randn(3, 4, 5).bfloat16(), torch.randn(4, 5).bfloat16()
    expected = distance(p.float(), t.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert (p.float() @ t.float().T).dtype == torch.bfloat16  # it is on
        if distance is DISTANCES["cross_entropy"]:
            found = cross_entropy(torch.log_softmax(p.float(), -1), torch.softmax(t.float(), -1))
        else:
            found = distance(p, t)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


# ------------------------------------------------------------------ the loss


def naive(distance: Callable, p: Tensor, t: Tensor, w: Callable[[int, int, int], float]) -> Tensor:
    M, T, B = len(p), len(t), p.shape[1]
    terms = [sum(w(i, j, b) * distance(p[i], t[j])[b] for i in range(M) for j in range(T)) for b in range(B)]
    return sum(terms) / B


@each_distance
@pytest.mark.parametrize("seed", range(5))
def test_pair_loss_with_weights_of_pairs_and_of_images(distance: Callable, seed: int) -> None:
    p, t = normal(4, 4, 5, seed=seed), normal(3, 4, 5, seed=seed + 50)
    draw = torch.rand(4, 3, generator=torch.Generator().manual_seed(seed))
    w = torch.where(draw < 0.4, 0.0, (4 * draw).round()).tolist()  # zeros, and equal ones side by side
    torch.testing.assert_close(pair_loss(distance, p, t, w), naive(distance, p, t, lambda i, j, _: w[i][j]))
    each = normal(4, 3, 4, seed=seed).abs()
    torch.testing.assert_close(pair_loss(distance, p, list(t), each), naive(distance, p, t, lambda *ijb: each[ijb]))


def test_pairs_of_weight_zero_are_not_computed() -> None:
    """Infinity times zero would be NaN, and every distance costs time."""
    p = torch.arange(5.0)[:, None, None].expand(5, 2, 3).clone()
    p[4] = math.inf
    t = 10 * torch.arange(1.0, 4.0)[:, None, None].expand(3, 2, 3)
    seen: list[tuple[list[float], float]] = []

    def distance(p_mBD: Tensor, t_BD: Tensor) -> Tensor:
        seen.append((p_mBD[:, 0, 0].tolist(), t_BD[0, 0].item()))
        return p_mBD.sum(-1) + t_BD.sum(-1)

    w = [[0, 1, 0], [2, 0, 0], [2, 3, 0], [2, 3, 0], [0, 0, 0]]
    loss = pair_loss(distance, p, t, w)
    assert seen == [([1, 2, 3], 10), ([0], 20), ([2, 3], 20)]
    assert loss == sum(w[i][j] * 3 * (i + 10 * (j + 1)) for i in range(4) for j in range(3))


@quick
@given(owner=st.lists(st.sampled_from([None, 0, 1, 2]), min_size=1, max_size=8), T=st.just(3))
def test_weights_of_others_and_own(owner: list, T: int) -> None:
    for weights, belongs in (
        (others(owner, T), lambda o, j: o is None or o != j),
        (own(owner, T), lambda o, j: o is None or o == j),
    ):
        pairs = {(i, j) for i, o in enumerate(owner) for j in range(T) if belongs(o, j)}
        for i, j in itertools.product(range(len(owner)), range(T)):
            assert weights[i][j] == pytest.approx(1 / len(pairs) if (i, j) in pairs else 0)
        assert sum(map(sum, weights)) == pytest.approx(1)


# ------------------------------------------------------------------ Sinkhorn (T9)


@quick
@given(N=st.integers(1, 40), P=st.integers(2, 12), seed=SEEDS, epsilon=st.floats(0.03, 1))
def test_sinkhorn_rows_sum_to_one_and_columns_are_used_alike(N: int, P: int, seed: int, epsilon: float) -> None:
    """Every round brings the columns closer to N / P, and many rounds there."""
    scores = F.normalize(normal(N, 6, seed=seed), dim=1) @ F.normalize(normal(P, 6, seed=seed + 1), dim=1).T
    unequal = []
    for rounds in (1, 2, 3, 3000):
        q = sinkhorn(scores, epsilon, rounds)
        assert (q > 0).all()
        torch.testing.assert_close(q.sum(1), torch.ones_like(q[:, 0]), rtol=1e-12, atol=0)
        unequal.append((q.sum(0).max() / q.sum(0).min()).item())
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(unequal))
    torch.testing.assert_close(q.sum(0), torch.full_like(q[0], N / P), rtol=0.05, atol=0)


def swavs_listing(scores_NP: Tensor, epsilon: float, rounds: int, prototypes_share: float) -> Tensor:
    """SwAV's code: [P, N], a total of one, prototypes to a share each, samples to 1/N each, finally times N."""
    Q = torch.exp(scores_NP / epsilon).T
    Q = Q / Q.sum()
    for _ in range(rounds):
        Q = Q / Q.sum(1, keepdim=True) * prototypes_share
        Q = Q / Q.sum(0, keepdim=True) / Q.shape[1]
    return (Q * Q.shape[1]).T


@pytest.mark.parametrize("rounds", [1, 3])
def test_sinkhorn_is_swavs_with_or_without_its_scale_of_prototypes(rounds: int) -> None:
    scores = F.normalize(normal(20, 6), dim=1) @ F.normalize(normal(5, 6, seed=1), dim=1).T
    for share in (1 / 5, 1.0):
        torch.testing.assert_close(sinkhorn(scores, 0.05, rounds), swavs_listing(scores, 0.05, rounds, share))
    assert (sinkhorn(scores, 0.05, rounds) - sinkhorn(scores, 0.05, rounds + 1)).abs().max() > 1e-3


def test_sinkhorn_holds_the_widest_scores_in_fp32_and_under_autocast() -> None:
    scores = torch.tensor([[1.0, -1.0], [1.0, -1.0], [1.0, -0.9], [-1.0, 1.0]])
    exact = sinkhorn(scores.double())
    torch.testing.assert_close(sinkhorn(scores).double(), exact, rtol=1e-4, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        half = sinkhorn(scores.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, sinkhorn(scores.bfloat16().float()))


def test_sinkhorn_over_processes_is_that_of_all_rows() -> None:
    scores = F.normalize(normal(12, 6), dim=1) @ F.normalize(normal(5, 6, seed=1), dim=1).T
    halves, parts, together = scores.split([5, 7]), {}, threading.Barrier(2, timeout=30)

    def one_of_two(rank: int) -> Tensor:
        def sum_over(x: Tensor) -> Tensor:
            together.wait()
            parts[rank] = x
            together.wait()
            return parts[0] + parts[1]

        return sinkhorn(halves[rank], sum_over=sum_over)

    with ThreadPoolExecutor(2) as pool:
        found = torch.cat([*pool.map(one_of_two, range(2))])
    torch.testing.assert_close(found, sinkhorn(scores))
    assert not torch.allclose(sinkhorn(halves[0]), found[:5])


def test_sinkhorn_has_no_gradient() -> None:
    assert not sinkhorn(torch.randn(4, 3, requires_grad=True)).requires_grad


# ------------------------------------------------------------------ tiles and their combinations


def test_divide_is_column_major_and_tile_major() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4).repeat(2, 3, 1, 1)
    x[1] += 100
    tiles = divide(x, 2)
    assert tiles.shape == (8, 3, 2, 2)
    assert [t[0, 0, 0].item() for t in tiles] == [0, 100, 8, 108, 2, 102, 10, 110]  # TL, BL, TR, BR
    with pytest.raises(ValueError, match="multiples"):
        divide(x, 3)


def test_subsets_are_lexicographic() -> None:
    assert subsets(4, 2) == ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
    for P, m in [(4, 1), (4, 4), (8, 2), (9, 3)]:
        assert list(subsets(P, m)) == sorted(set(subsets(P, m)))
        assert len(subsets(P, m)) == math.comb(P, m)
        assert subsets(P, m, math.comb(P, m)) == subsets(P, m)


@pytest.mark.parametrize(
    ("P", "m", "num"),
    [
        *[(4, 2, 2), (4, 2, 4), (4, 1, 4), (4, 3, 4)],
        *[(8, 2, 4), (8, 2, 12), (8, 2, 24), (8, 3, 8)],
        *[(9, 2, 9), (9, 3, 66), (9, 4, 54), (18, 2, 81)],
    ],
)
def test_some_subsets_use_every_tile_equally(P: int, m: int, num: int) -> None:
    """The last ones are of 3 x 3 tiles, where a search through all choices does not end."""
    chosen = subsets(P, m, num)
    assert len(set(chosen)) == num
    assert set(chosen) <= set(subsets(P, m))
    assert list(chosen) == sorted(chosen)
    assert {sum(tile in c for c in chosen) for tile in range(P)} == {num * m // P}


@pytest.mark.parametrize(
    ("P", "m", "num", "message"),
    [
        (4, 0, None, "cannot combine 0 of 4 tiles: 1 to 4"),
        (4, 5, None, "cannot combine 5 of 4"),
        *((4, 2, num, "choose 2, 4, 6") for num in (-2, 0, 1, 3, 5, 8)),
        (9, 2, 10, "choose 9, 18, 27, 36"),
    ],
)
def test_impossible_numbers_of_subsets(P: int, m: int, num: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        subsets(P, m, num)


@quick
@given(n=st.integers(1, 3), seed=SEEDS, data=st.data())
def test_combine_averages(n: int, seed: int, data: st.DataObject) -> None:
    P = n * n
    m = data.draw(st.integers(1, P))
    h = normal(P, 3, 5, seed=seed)
    found = combine(h, m)
    assert len(found) == math.comb(P, m)
    for row, tiles in zip(found, itertools.combinations(range(P), m), strict=True):
        torch.testing.assert_close(row, torch.stack([h[i] for i in tiles]).mean(0), rtol=1e-6, atol=1e-6)


def test_combine_some_or_by_other_rules() -> None:
    h = torch.randn(4, 3, 5)
    some = combine(h, 2, 2)
    torch.testing.assert_close(some, torch.stack([(h[a] + h[b]) / 2 for a, b in subsets(4, 2, 2)]))
    for m in (2, 3):
        chosen = subsets(4, m)
        largest = combine(h, m, by="max")
        assert torch.equal(largest, torch.stack([h[list(tiles)].max(0).values for tiles in chosen]))
        weighted = combine(h, m, by="weighted", weight=0.7)
        rest = [0.7 * h[first] + 0.3 * h[list(more)].mean(0) for first, *more in chosen]
        torch.testing.assert_close(weighted, torch.stack(rest))
    for rule in ("mean", "weighted", "beta", "max"):
        torch.testing.assert_close(combine(h, 1, by=rule, weight=0.3), h)
        assert combine(h.bfloat16(), 2, by=rule, weight=0.5).dtype == torch.bfloat16
    torch.testing.assert_close(combine(h, 2, by="weighted", weight=0.5), combine(h, 2))


@pytest.mark.parametrize("w", [0.3, 2.0])
@pytest.mark.parametrize("m", [2, 3])
def test_combine_by_beta_draws_the_first_tiles_share(m: int, w: float) -> None:
    """One-hot features show the shares: mean 1/2 and variance 1 / (4 (2w + 1)), drawn for every image and subset."""
    B = 20_000
    h = torch.eye(4)[:, None].expand(4, B, 4)
    shares = combine(h, m, by="beta", weight=w)
    for row, (first, *rest) in zip(shares, subsets(4, m), strict=True):
        share = row[:, first]
        assert abs(share.mean() - 0.5) < 0.015
        assert abs(share.var() * 4 * (2 * w + 1) - 1) < 0.05
        torch.testing.assert_close(row.sum(1), torch.ones(B))
        torch.testing.assert_close(row[:, rest], ((1 - share) / len(rest))[:, None].expand(B, len(rest)))
    correlation = torch.corrcoef(torch.stack([shares[0][:, 0], shares[1][:, 0]]))[0, 1]
    assert abs(correlation) < 0.03


# ------------------------------------------------------------------ gradients, against finite differences


@each_distance
def test_gradients_of_distances_and_of_pair_loss(distance: Callable) -> None:
    """Of predictions and of targets: the methods cut the latter off, not the functions."""
    inputs = [normal(3, 4, 5), normal(2, 4, 5, seed=1), normal(3, 2, 4, seed=2).abs()]
    assert torch.autograd.gradcheck(functools.partial(pair_loss, distance), [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("by", ["mean", "weighted", "beta", "max"])
def test_gradient_of_combine(by: str) -> None:
    def combined(h: Tensor) -> Tensor:
        torch.manual_seed(1)  # the same shares at every call
        return combine(h, 3, by=by, weight=0.4)

    assert torch.autograd.gradcheck(combined, normal(4, 2, 3).requires_grad_())


# ------------------------------------------------------------------ monitor


def test_feature_std_is_the_mean_over_channels_and_views() -> None:
    z = torch.randn(3, 16, 8) + 1
    expected = torch.stack([F.normalize(view, dim=1).std(0) for view in z]).mean()
    torch.testing.assert_close(feature_std(z), expected)
    assert not feature_std(z.requires_grad_()).requires_grad
