"""Passes of views through a network, each view with BatchNorm statistics of its own where the method says so.

Legend: B images of this process, K views, D features.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl import processes
from fastssl.networks.batch_norm import GroupedBatchNorm, batch_norm_groups

MICRO_BATCHES = "micro_batches"
"""Attribute of a network whose passes are made in parts (`networks.micro_batch`)."""


def in_groups(
    net: nn.Module, x: Tensor | Sequence[Tensor], views: int, parts: int = 1, call: Callable | None = None
) -> Tensor:
    """net(x) for rows [V, P, B] of V views in P parts of B images each, with BatchNorm statistics for each view.

    One pass, unless a BatchNorm in `net` is not a `GroupedBatchNorm` (outside a run, or one that does more): then one
    pass for each view. `x` may come in several tensors: they are joined, but not all of them for micro-batches. `call`:
    a function of x that runs the network, or part of it, in place of net itself.
    """
    pieces = [x] if isinstance(x, Tensor) else list(x)
    call = net if call is None else call
    norms = (m for m in net.modules() if isinstance(m, _BatchNorm))
    if views > 1 and net.training and not all(isinstance(m, GroupedBatchNorm) for m in norms):
        return torch.cat([call(rows) for rows in joined(pieces).chunk(views)])

    def forward(x: Tensor) -> Tensor:
        with batch_norm_groups(net, views=views, parts=parts):
            return call(x)

    micro = getattr(net, MICRO_BATCHES, None)
    if micro is not None and net.training and sum(map(len, pieces)) > views * parts * micro.images:
        return micro(net, forward, pieces, views * parts)
    return forward(joined(pieces))


def joined(pieces: Sequence[Tensor]) -> Tensor:
    """torch.cat, but a single tensor as it is."""
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))


def encode(net: nn.Module, views: Sequence[Tensor]) -> Tensor:
    """Features [K, B, D] of views of any sizes: neighbours of one size go through the network in one pass, each with
    BatchNorm statistics of its own (SimSiam's code encodes view after view)."""
    return _encode(net, views, lambda num: (num, 1))


def encode_together(net: nn.Module, views: Sequence[Tensor]) -> Tensor:
    """`encode` with BatchNorm that sees neighbouring views of one size as one batch (SwAV's and DINO's multi-crop)."""
    return _encode(net, views, lambda num: (1, num))


def _encode(net: nn.Module, views: Sequence[Tensor], layout: Callable[[int], tuple[int, int]]) -> Tensor:
    groups = (list(alike) for _, alike in itertools.groupby(views, key=lambda x: x.shape))
    features = [in_groups(net, alike, *layout(len(alike))) for alike in groups]
    return torch.cat(features).unflatten(0, (len(views), -1))


def each_view(head: nn.Module, x_KBD: Tensor) -> Tensor:
    """head(x) for the rows of every view, [K, B, D] to [K, B, D'], with BatchNorm statistics for each view."""
    return in_groups(head, x_KBD.flatten(0, 1), len(x_KBD)).unflatten(0, x_KBD.shape[:2])


def all_views(head: nn.Module, x_KBD: Tensor) -> Tensor:
    """`each_view` with BatchNorm that sees the rows of all views as one batch."""
    return in_groups(head, x_KBD.flatten(0, 1), 1, len(x_KBD)).unflatten(0, x_KBD.shape[:2])


def encode_shuffled(net: nn.Module, x: Tensor) -> Tensor:
    """net(x) computed with the images of all processes dealt out anew, rows back in their places, without gradient.

    BatchNorm then cannot tell a key by the company it is in (MoCo section 3.3). In one process only the order within
    the batch changes, which matters with `splits` in its BatchNorm groups.
    """
    with torch.no_grad():
        everything = processes.gather(x)
        order = processes.same_permutation(len(everything), x.device)
        mine = order[processes.own_rows(len(x), x.device)]
        rows = processes.gather(in_groups(net, everything[mine].contiguous(memory_format=torch.channels_last), 1))
        back = torch.empty_like(rows)
        back[order] = rows
        return back[processes.own_rows(len(x), x.device)]
