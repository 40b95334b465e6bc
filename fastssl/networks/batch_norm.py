"""BatchNorm groups: rows of one pass that have statistics of their own, as if each group went through by itself.

The rows of a pass are [V, P, B]: V views, P parts of each view (tiles, combinations of them), B images of this process.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl import processes
from fastssl.device import at_least_fp32
from loaders.errors import UserError

Module = TypeVar("Module", bound=nn.Module)


class Groups(NamedTuple):
    """How the rows [V, P, B] of a pass are grouped. A group is all parts of one view."""

    views: int = 1
    """V."""
    parts: int = 1
    """P."""
    images: int | None = None
    """Images of a group, for micro-batches. None: all B."""
    splits: int = 1
    """Each group is cut into as many, its images going to them in turn (MoCo's code)."""
    joint: bool = False
    """All views are one group."""
    sync: bool = False
    """Groups include the images of all processes."""
    running: Literal["update", "copy", "leave"] = "update"
    """What follows the groups: the running statistics; copies of them, for a pass that is made again and has to save
    for its gradient what the first one saved; or nothing, for any other pass that is made again."""


class GroupedBatchNorm(nn.BatchNorm2d):
    """BatchNorm with statistics for each of `groups`, for 1-D and 2-D inputs. State dict as BatchNorm's.

    Running statistics follow the groups one after another. `groups` is set by the functions of this module alone.
    """

    groups = Groups()

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept [N, C, ...]."""

    def forward(self, input: Tensor) -> Tensor:
        return self._normalise(input) if self.training else super().forward(input)

    def _normalise(self, x: Tensor) -> Tensor:
        """The forward pass in train mode, [N, C, ...]."""
        given = self.groups
        views, parts = (1, given.views * given.parts) if given.joint else (given.views, given.parts)
        num = len(x) // (views * parts)
        batches = num // min(num, given.images or num)
        groups = views * batches * given.splits
        if given.running == "update":
            self._tracked(self.num_batches_tracked).add_(views * batches)
        apart = (parts > 1 and batches > 1) or given.splits > 1  # a group's rows are not neighbours
        if apart or self._synced or (groups > 1 and torch.compiler.is_compiling()):
            return self._in_one_pass(x, (views, parts, batches, -1, given.splits))
        if groups == 1:
            return self._plain(x)
        out: list[Tensor] = [x] * groups  # replaced below, batch after batch as separate passes would come
        each = x.chunk(groups)
        for i in (view * batches + batch for batch in range(batches) for view in range(views)):
            out[i] = self._plain(each[i])
        return torch.cat(out)

    def _plain(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.groups.running != "update":
            copies = self.groups.running == "copy"
            mean, var = (self._tracked(b).clone() if copies else None for b in (mean, var))
        return F.batch_norm(x, mean, var, self.weight, self.bias, True, self._rate, self.eps)

    def _in_one_pass(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The same in plain operations, which a compiler fuses with what follows. `shape` is [V, P, batches, B, S]."""
        rows = at_least_fp32(x).view(*shape, *x.shape[1:])
        inside = (1, 3, *range(6, rows.ndim))
        var, mean = torch.var_mean(rows, inside, correction=0, keepdim=True)
        count = rows.numel() // mean.numel()
        if self._synced:
            count *= processes.size()
            mean_R, var_R = processes.gather_with_grad(torch.stack([mean, var])[None]).unbind(1)
            mean = mean_R.mean(0)
            var = (var_R + (mean_R - mean).square()).mean(0)
        if self.groups.running == "update":
            self._track(mean.detach(), var.detach() * (count / max(1, count - 1)))
        scale = torch.rsqrt(var + self.eps)
        if self.affine:
            channels = (-1, *[1] * (x.ndim - 2))
            rows = (rows - mean) * (scale * self.weight.view(channels)) + self.bias.view(channels)
        else:
            rows = (rows - mean) * scale
        return rows.view(x.shape).to(x.dtype)

    def _track(self, mean: Tensor, var: Tensor) -> None:
        """Running statistics after the groups [V, 1, batches, 1, S, C, ...]: batch by batch, splits averaged."""
        for running, new in ((self._tracked(self.running_mean), mean), (self._tracked(self.running_var), var)):
            for new_C in new.flatten(5)[:, 0, :, 0].mean(2).transpose(0, 1).flatten(0, 1).to(running.dtype):
                running.data.lerp_(new_C, self._rate)  # .data: as in torch's own, it is no change to what was saved

    @staticmethod
    def _tracked(buffer: Tensor | None) -> Tensor:
        if buffer is None:
            raise ValueError("BatchNorm in groups needs running statistics: track_running_stats=True")
        return buffer

    @property
    def _synced(self) -> bool:
        return self.groups.sync and processes.size() > 1

    @property
    def _rate(self) -> float:
        if self.momentum is None:
            raise ValueError("BatchNorm in groups has no cumulative average: give it a momentum")
        return self.momentum


def group_batch_norm(module: Module, **groups: Any) -> Module:
    """Make every BatchNorm in `module` a grouped one, with these fields of `Groups`; state and names stay.

    torch's BatchNorm1d and BatchNorm2d and timm's BatchNormAct2d can be grouped, others are left alone (see
    `need_batch_norm_groups`). Returns `module`.
    """
    for m in module.modules():
        if (grouped := _grouped(type(m))) is not None:
            m.__class__ = grouped
        if isinstance(m, GroupedBatchNorm):
            m.groups = m.groups._replace(**groups)
    return module


@contextlib.contextmanager
def batch_norm_groups(net: nn.Module, **groups: Any) -> Iterator[None]:
    """Set these fields of `Groups` in every grouped BatchNorm of `net` for the passes inside the block."""
    before = {m: m.groups for m in net.modules() if isinstance(m, GroupedBatchNorm)}
    for m, old in before.items():
        m.groups = old._replace(**groups)
    try:
        yield
    finally:
        for m, old in before.items():
            m.groups = old


def groups_of(net: nn.Module) -> Groups:
    """`Groups` of the BatchNorms in `net`, which all have the same; the default without any."""
    return next((m.groups for m in net.modules() if isinstance(m, GroupedBatchNorm)), Groups())


def need_batch_norm_groups(module: nn.Module, flag: str) -> None:
    """Raise UserError if a BatchNorm in `module` has more to it than groups can be made of."""
    for m in module.modules():
        if isinstance(m, _BatchNorm) and not isinstance(m, GroupedBatchNorm) and _grouped(type(m)) is None:
            raise UserError(
                f"{flag} changes BatchNorm layers, but the network's {type(m).__name__} does more: leave it out"
            )


def ungroup_batch_norm(module: Module) -> Module:
    """Make every grouped BatchNorm in `module` the plain one that it was (2-D), and return `module`."""
    for m in module.modules():
        if isinstance(m, GroupedBatchNorm):
            plain = next(kind for kind in type(m).__mro__ if not issubclass(kind, GroupedBatchNorm))
            m.__class__ = plain  # type: ignore[assignment]
    return module


def running_norms(net: nn.Module) -> list[_BatchNorm]:
    """BatchNorms with running statistics."""
    return [m for m in net.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


def _grouped(kind: type) -> type[GroupedBatchNorm] | None:
    """The class that does in groups what `kind` does; None if there is none."""
    if kind in (nn.BatchNorm1d, nn.BatchNorm2d):
        return GroupedBatchNorm
    if kind.__name__ == "BatchNormAct2d" and kind.__module__.startswith("timm."):
        return _with_activation(kind)  # type: ignore[arg-type]  # classes are hashable
    return None


@functools.cache
def _with_activation(kind: type[Any]) -> type[GroupedBatchNorm]:
    """`GroupedBatchNorm`, then dropping and activation as in `kind`: timm's BatchNormAct2d, not named in an import here
    because timm takes a second to import."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.act(self.drop(self._normalise(x))) if self.training else kind.forward(self, x)

    return type("GroupedBatchNormAct", (GroupedBatchNorm, kind), {"forward": forward})
