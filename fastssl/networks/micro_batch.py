"""Big batches on small cards: the backbone sees a few images at a time, the loss all of them.

Gradients at the features of the whole batch are gradients at the features of its parts. So the features are made
without a graph, part by part; the loss and its gradient at them as ever; and then each part's pass is made again, with
its graph, and goes backward from there (Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited
Setup", 2021). Exact for every loss, for one more forward pass of what is trained; BatchNorm sees the parts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastssl.networks.batch_norm import batch_norm_groups, group_batch_norm, need_batch_norm_groups
from fastssl.networks.encode import MICRO_BATCHES, joined
from loaders import Batch


class _Pass(NamedTuple):
    """A pass that was made without a graph, to be made again."""

    net: nn.Module
    forward: Callable[[Tensor], Tensor]
    groups_BCHW: list[Tensor]
    features: Tensor
    random: list[Tensor]
    """State of the random numbers before each micro-batch."""


class MicroBatches:
    """Passes of networks in parts of `images` images. `networks.encode.in_groups` hands them over."""

    def __init__(self, images: int):
        self.images = images
        self._passes: list[_Pass] = []

    def __call__(
        self, net: nn.Module, forward: Callable[[Tensor], Tensor], pieces: Sequence[Tensor], groups: int
    ) -> Tensor:
        """Compute forward(x), a pass through `net`, of the rows [groups, B] in `pieces`, without a graph.

        Where gradients are on, `backward` makes the pass again. The pieces, which are a batch's views, are not copied
        as a whole.
        """
        groups_BCHW = [g for x in pieces for g in x.chunk(groups // len(pieces))]
        out, random = [], []
        with torch.no_grad():
            for rows in self._parts(groups_BCHW):
                random.append(_random_state(rows.device))
                out.append(forward(rows).unflatten(0, (groups, -1)))
        h = torch.cat(out, 1).flatten(0, 1)
        if torch.is_grad_enabled():
            self._passes.append(_Pass(net, forward, groups_BCHW, h.requires_grad_(), random))
        return h

    def backward(self, context: Callable[[], contextlib.AbstractContextManager]) -> None:
        """Add the gradients of the weights, from those at the features. `context`: what forward passes run in."""
        passes, self._passes = self._passes, []
        for net, forward, groups, h, random in passes:
            if h.grad is None:
                continue
            grads = self._parts(h.grad.chunk(len(groups)))
            for rows, grad, state in zip(self._parts(groups), grads, random, strict=True):
                with _same_random(state, rows.device), batch_norm_groups(net, running="leave"), context():
                    again = forward(rows)
                again.backward(grad)

    def _parts(self, groups: Sequence[Tensor]) -> Iterator[Tensor]:
        """Micro-batches of the rows of all groups."""
        for start in range(0, len(groups[0]), self.images):
            yield joined([g[start : start + self.images] for g in groups])


def use_micro_batches(method: nn.Module, networks: Iterable[nn.Module], images: int) -> MicroBatches:
    """Let `networks` of `method` see `images` images at a time, and all its BatchNorms normalise groups of as many.

    Raises UserError for a network whose BatchNorm cannot be told to.
    """
    need_batch_norm_groups(method, "--micro-batch")
    group_batch_norm(method, images=images)
    micro = MicroBatches(images)
    for net in networks:
        setattr(net, MICRO_BATCHES, micro)
    return micro


def slices(batch: Batch, images: int) -> Iterator[Batch]:
    """The batch in parts of `images` images, with their tiles."""
    num = len(batch.index)
    for start in range(0, num, images):
        here = slice(start, start + images)
        tiles = None
        if batch.tiles is not None:
            tiles = [torch.cat([t[here] for t in x.split(num)]) for x in batch.tiles]
        yield Batch([x[here] for x in batch.views], tiles, batch.index[here], batch.label[here])


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextlib.contextmanager
def _same_random(state: Tensor, device: torch.device) -> Iterator[None]:
    """The random numbers of an earlier pass (stochastic depth); afterwards those that would have come next."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
        yield
