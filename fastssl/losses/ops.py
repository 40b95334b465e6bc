"""Pure functions that the methods are written with.

Every method is L = mean_b sum_ij w_ijb d(p_ib, sg[t_jb]) (`pair_loss`): predictions p, targets t without gradient, a
distance d and pair weights w. Methods differ in what t is (another view, the mean of the others, the nearest
neighbour, balanced codes, a sharpened softmax) and in d; add-ons differ in w.

`divide` (images to tiles) is the loader's own, which can do it ahead of training.

Legend: B images of this process, N of all processes (or keys in all), K views, M predictions and T targets per image,
P tiles per view, C combinations of them, D features.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastssl.device import at_least_fp32
from loaders.augment import divide

__all__ = [
    "combine", "cross_entropy", "divide", "feature_std", "info_nce", "info_nce_queue",
    "mean_of_others", "negative_cosine", "others", "own", "pair_loss", "sinkhorn", "subsets",
]  # fmt: skip

# A view's index, or None for a prediction that was made from none of the target views.
Owner = int | None
Weights = Sequence[Sequence[float]] | Tensor

# ------------------------------------------------------------------ the loss


def pair_loss(
    distance: Callable[[Tensor, Tensor], Tensor], p_MBD: Tensor, t: Sequence[Tensor] | Tensor, w: Weights
) -> Tensor:
    """L = mean_b sum_ij w_ijb d(p_ib, t_jb), a scalar.

    `distance(p_mBD, t_j)` gives [m, B] for some of the predictions and one target. `w` is [M][T] numbers, where pairs
    of weight 0 are not computed, or a tensor [M, T, B] with weights of each image. The caller detaches the targets.
    """
    terms: list[Tensor] = []
    for j, t_j in enumerate(t):
        if isinstance(w, Tensor):
            terms.append((w[:, j] * distance(p_MBD, t_j)).sum(0))
        else:
            terms += [weight * distance(p_MBD[rows], t_j).sum(0) for rows, weight in _runs([row[j] for row in w])]
    return functools.reduce(torch.add, terms).mean()


def _runs(column: Sequence[float]) -> Iterator[tuple[slice, float]]:
    """Neighbouring rows of equal weight, less those of weight 0: slices need no index on the device."""
    start = 0
    for weight, run in itertools.groupby(column):
        stop = start + len(list(run))
        if weight:
            yield slice(start, stop), weight
        start = stop


def others(owner_M: Sequence[Owner], num_targets: int) -> list[list[float]]:
    """Equal weights [M][T], sum 1, on all pairs of a prediction and a target of another view."""
    return _equal([[o != j for j in range(num_targets)] for o in owner_M])


def own(owner_M: Sequence[Owner], num_targets: int) -> list[list[float]]:
    """Equal weights [M][T], sum 1, on all pairs of a prediction and its own view's target (or any, if it has no view).

    For targets that are made from the other views already, and for the ablation "same view as target".
    """
    return _equal([[o is None or o == j for j in range(num_targets)] for o in owner_M])


def _equal(chosen: list[list[bool]]) -> list[list[float]]:
    count = sum(map(sum, chosen))
    return [[float(c) / count for c in row] for row in chosen]


# ------------------------------------------------------------------ distances


def _fp32(function: Callable) -> Callable:
    """Half precision has three digits near 1, where cosines live: reductions run in fp32 under autocast too."""

    @functools.wraps(function)
    def run(p: Tensor, *rest: Any, **options: Any) -> Tensor:
        if not torch.amp.is_autocast_available(p.device.type):  # the meta device, on which costs are counted
            return function(p, *rest, **options)
        with torch.autocast(p.device.type, enabled=False):
            return function(p, *rest, **options)

    return run


@_fp32
def negative_cosine(p: Tensor, t: Tensor) -> Tensor:
    """D(p, t) = -cos(p, t) over the last axis, in fp32 (SimSiam eq. 1). The caller detaches t."""
    return -F.cosine_similarity(at_least_fp32(p), at_least_fp32(t), dim=-1, eps=1e-8)


@_fp32
def info_nce(q_BD: Tensor, k_ND: Tensor, temperature: float, positives: Tensor) -> Tensor:
    """-log exp(q.k+/T) / sum_n exp(q.k_n/T) of L2-normalised rows, [..., B], in fp32 (CPC; MoCo eq. 1).

    q may have leading axes. `positives` [B] are the indices of each row's own key among the N.
    """
    logits = F.normalize(at_least_fp32(q_BD), dim=-1) @ F.normalize(at_least_fp32(k_ND), dim=-1).T / temperature
    return torch.logsumexp(logits, -1) - logits.gather(-1, positives.expand(logits.shape[:-1])[..., None])[..., 0]


@_fp32
def info_nce_queue(q_BD: Tensor, k_BD: Tensor, queue_QD: Tensor, temperature: float) -> Tensor:
    """-log exp(q.k/T) / (exp(q.k/T) + sum_n exp(q.queue_n/T)) of L2-normalised rows, [..., B], in fp32 (MoCo eq. 1).

    q may have leading axes. The queue's rows have unit length already.
    """
    q = F.normalize(at_least_fp32(q_BD), dim=-1)
    positive = (q * F.normalize(at_least_fp32(k_BD), dim=-1)).sum(-1, keepdim=True)
    logits = torch.cat([positive, q @ queue_QD.to(q.dtype).T], -1) / temperature
    return torch.logsumexp(logits, -1) - logits[..., 0]


@_fp32
def cross_entropy(log_p: Tensor, t: Tensor) -> Tensor:
    """-sum_k t_k log p_k over the last axis, in fp32, of log-probabilities and target probabilities."""
    return -(at_least_fp32(t) * at_least_fp32(log_p)).sum(-1)


# ------------------------------------------------------------------ targets


def mean_of_others(z_KBD: Tensor) -> Tensor:
    """For every view the mean of the K - 1 other views' outputs: (sum - self) / (K - 1), one pass (FastSiam eq. 4).

    Raw outputs are averaged; normalising first would be another estimator (it weighs views by 1/|z|).
    Returns [K, B, D]. Raises ValueError for K < 2.
    """
    num_views = z_KBD.shape[0]
    if num_views < 2:
        raise ValueError(f"the mean of the other views needs at least 2 views, got {num_views}")
    if num_views == 2:
        return z_KBD.flip(0)  # exact: (a + b) - a is not always b in floating point
    return (z_KBD.sum(0, keepdim=True) - z_KBD) / (num_views - 1)


@torch.no_grad()
@_fp32
def sinkhorn(
    scores_NP: Tensor, epsilon: float = 0.05, iterations: int = 3, sum_over: Callable[[Tensor], Tensor] = lambda x: x
) -> Tensor:
    """Codes [N, P] of N samples over P prototypes that use all prototypes alike (SwAV section 3.1 and its code).

    exp(scores / epsilon), columns and rows normalised in turn: rows end with sum 1, columns with about N/P. Scores are
    cosines, so that fp32 holds exp(1 / 0.05). `sum_over` adds up a tensor over the processes that hold the samples.
    """
    q_NP = torch.exp(at_least_fp32(scores_NP) / epsilon)
    for _ in range(iterations):
        q_NP = q_NP / sum_over(q_NP.sum(0))
        q_NP = q_NP / q_NP.sum(1, keepdim=True)
    return q_NP


# ------------------------------------------------------------------ combinatorial patches


def _constant(function: Callable) -> Callable:
    """Computed once for the same arguments, and a constant to the compiler: no copy to the device in every step."""
    known: dict[tuple, object] = {}

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        if args in known:
            return known[args]
        made = function(*args)
        if not isinstance(made, FakeTensor):  # as when costs are counted: it has no values
            known[args] = made
        return made

    # What torch.compiler.assume_constant_result sets. Calling it would import torch._dynamo: a second at every start.
    run.__dict__["_dynamo_marked_constant"] = True
    return run


@_constant
def subsets(P: int, m: int, num: int | None = None) -> tuple[tuple[int, ...], ...]:
    """`num` subsets (None: all) of m out of P tiles, lexicographic, in which every tile is used equally often.

    Raises ValueError if there are no such subsets.
    """
    if not 1 <= m <= P:
        raise ValueError(f"cannot combine {m} of {P} tiles: 1 to {P}")
    every = tuple(itertools.combinations(range(P), m))
    if num is None or num == len(every):
        return every
    if not 1 <= num < len(every) or num * m % P:
        fitting = [str(n) for n in range(1, len(every) + 1) if n * m % P == 0]
        raise ValueError(f"{num} combinations cannot use each of {P} tiles equally often: choose {', '.join(fitting)}")
    return _equal_use(every, num)


def _equal_use(every: Sequence[tuple[int, ...]], num: int) -> tuple[tuple[int, ...], ...]:
    """`num` of all subsets of one size, each item equally often, which divides up.

    From the first ones on, while an item is used more than another, a subset gives the first up for the second. Such a
    subset there is: more of those chosen have the one item alone than the other alone, so some have no counterpart.
    """
    chosen, P = set(every[:num]), every[-1][-1] + 1
    while True:
        count = [sum(item in tiles for tiles in chosen) for item in range(P)]
        most, least = count.index(max(count)), count.index(min(count))
        if count[most] == count[least]:
            return tuple(sorted(chosen))
        for tiles in sorted(chosen, reverse=True):
            changed = tuple(sorted({*tiles} - {most} | {least}))
            if most in tiles and least not in tiles and changed not in chosen:
                chosen ^= {tiles, changed}
                break


def combine(h_PBD: Tensor, m: int, num: int | None = None, *, by: str = "mean", weight: float | None = None) -> Tensor:
    """Combinations [C, B, D] of the features of m tiles each (Fast-MoCo section 3.2): one small matrix product.

    `num`: how many of the subsets (see `subsets`). `by`: "mean"; "weighted" gives the first tile `weight` and the
    others equal shares of the rest; "beta" draws the first tile's share for every combination and image from
    Beta(weight, weight); "max" takes the largest of each feature.
    """
    P, B = h_PBD.shape[:2]
    chosen = subsets(P, m, num)
    if by == "max":
        return torch.stack([torch.stack([h_PBD[i] for i in tiles]).amax(0) for tiles in chosen])
    if by == "beta" and m > 1:
        if weight is None:
            raise ValueError('combine(by="beta") needs the parameter of the Beta distribution as its weight')
        share = torch.full((len(chosen), B), weight, device=h_PBD.device)
        share_CB = torch.distributions.Beta(share, share, validate_args=False).sample()  # checks would wait for the GPU
        first_CP, rest_CP = (_matrix(P, chosen, one, h_PBD.device) for one in (1.0, 0.0))
        a_CPB = share_CB[:, None] * first_CP[..., None] + (1 - share_CB[:, None]) * rest_CP[..., None]
        return torch.einsum("cpb,pbd->cbd", a_CPB.to(h_PBD.dtype), h_PBD)
    first = weight if by == "weighted" else None
    return torch.einsum("cp,pbd->cbd", _matrix(P, chosen, first, h_PBD.device).to(h_PBD.dtype), h_PBD)


@_constant
def _matrix(P: int, chosen: tuple[tuple[int, ...], ...], first: float | None, device: torch.device) -> Tensor:
    """[C, P]: the share of each tile in each combination; `first` is that of a subset's first tile (None: equal)."""
    a_CP = torch.zeros(len(chosen), P)
    for row, tiles in zip(a_CP, chosen, strict=True):
        share = 1 / len(tiles) if first is None or len(tiles) == 1 else first
        row[tiles[0]] = share
        for tile in tiles[1:]:
            row[tile] = (1 - share) / (len(tiles) - 1)
    return a_CP.to(device)


# ------------------------------------------------------------------ monitor


@torch.no_grad()
def feature_std(z: Tensor) -> Tensor:
    """Mean over channels of the batch std of L2-normalised outputs: 1/sqrt(D) is healthy, 0 is collapsed.

    (SimSiam section 4.1.) z [..., B, D]; leading axes (views) are averaged.
    """
    return F.normalize(z.float(), dim=-1).std(dim=-2).mean()
