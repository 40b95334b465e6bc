"""BatchNorm groups: rows of one batch that are normalised apart, as if each group went through by itself.

Legend: B images of this process, V views, P parts of each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl import processes
from fastssl.device import at_least_fp32
from loaders.errors import UserError


class GroupedBatchNorm(nn.BatchNorm2d):
    """BatchNorm whose batch falls into groups with statistics of their own, as if each went through by itself.

    Rows are [V, P, B]: V views, P parts of each (tiles, combinations), B images. A group is all parts of one view of
    `images` images, or of all; running statistics follow the groups one after another. State dict as BatchNorm's.
    """

    views = parts = 1  # V and P of the rows that come next: see `in_groups`
    images: int | None = None  # images per group (micro-batches); None: all
    splits = 1  # these are dealt out to as many groups, one after another (MoCo's code)
    joint = False  # one group for all views
    sync = False  # groups reach over all processes

    def _check_input_dim(self, x: Tensor) -> None:
        """[N, C, ...]"""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        views, parts = (1, self.views * self.parts) if self.joint else (self.views, self.parts)
        num = len(x) // (views * parts)
        batches = num // min(num, self.images or num)
        groups = views * batches * self.splits
        if not _frozen:
            self.num_batches_tracked.add_(views * batches)
        apart = (parts > 1 and batches > 1) or self.splits > 1  # a group's rows are not neighbours
        if apart or self._synced or (groups > 1 and torch.compiler.is_compiling()):
            return self._in_one_pass(x, (views, parts, batches, -1, self.splits))
        if groups == 1:
            return self._plain(x)
        out: list[Tensor] = [x] * groups  # replaced below, batch after batch as separate passes would come
        each = x.chunk(groups)
        for i in (view * batches + batch for batch in range(batches) for view in range(views)):
            out[i] = self._plain(each[i])
        return torch.cat(out)

    def _plain(self, x: Tensor) -> Tensor:
        running = (None, None) if _frozen else (self.running_mean, self.running_var)
        return F.batch_norm(x, *running, self.weight, self.bias, True, self._rate, self.eps)

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
        if not _frozen:
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
        for running, new in ((self.running_mean, mean), (self.running_var, var)):
            for new_C in new.flatten(5)[:, 0, :, 0].mean(2).transpose(0, 1).flatten(0, 1).to(running.dtype):
                running.data.lerp_(new_C, self._rate)  # .data: as in torch's own, it is no change to what was saved

    @property
    def _synced(self) -> bool:
        return self.sync and processes.size() > 1

    @property
    def _rate(self) -> float:
        if self.momentum is None:
            raise ValueError("BatchNorm in groups has no cumulative average: give it a momentum")
        return self.momentum


_frozen = False


@contextlib.contextmanager
def frozen_running_stats() -> Iterator[None]:
    """`GroupedBatchNorm`s inside leave their running statistics alone: for passes that are made a second time."""
    global _frozen
    before, _frozen = _frozen, True
    try:
        yield
    finally:
        _frozen = before


def group_batch_norm(module: nn.Module, *, joint: bool = False, sync: bool = False) -> nn.Module:
    """Make every plain BatchNorm in `module` a `GroupedBatchNorm`; state and names stay. Returns `module`.

    joint: statistics of all views together. sync: over all processes.
    """
    for m in module.modules():
        if type(m) in (nn.BatchNorm1d, nn.BatchNorm2d):
            m.__class__ = GroupedBatchNorm
        if isinstance(m, GroupedBatchNorm):
            m.joint, m.sync = joint, sync
    return module


def split_batch_norm(module: nn.Module, splits: int) -> nn.Module:
    """Let every BatchNorm in `module` normalise each of `splits` parts of the batch by itself. Returns `module`.

    It stands in for as many GPUs without synchronised BatchNorm: MoCo's shuffled keys need them (MoCo section 3.3).
    """
    need_plain_batch_norm(module, "--bn-splits")
    for m in group_batch_norm(module).modules():
        if isinstance(m, GroupedBatchNorm):
            m.splits = splits
    return module


def need_plain_batch_norm(module: nn.Module, flag: str) -> None:
    """Raise UserError if a BatchNorm in `module` does more than that (some of timm's activate, too): its groups cannot
    be told apart."""
    for m in module.modules():
        if isinstance(m, _BatchNorm) and type(m) not in (nn.BatchNorm1d, nn.BatchNorm2d, GroupedBatchNorm):
            raise UserError(
                f"{flag} changes BatchNorm layers, but the network's {type(m).__name__} does more: leave it out"
            )


def has_batch_norm(net: nn.Module) -> bool:
    """Whether there are running statistics to recompute."""
    return bool(running_norms(net))


def running_norms(net: nn.Module) -> list[_BatchNorm]:
    return [m for m in net.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
