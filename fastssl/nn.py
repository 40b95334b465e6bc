"""Heads, BatchNorm groups and the queue: what methods are built from besides a backbone.

Legend: B images of this process, K views, D features, N rows of all processes.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl import dist
from fastssl.ops import at_least_fp32
from fastssl.options import at_least
from loaders.errors import UserError

OutputNorm = Literal["none", "fixed", "affine"]  # BatchNorm on a head's output: none, without or with scale and shift
PredictorBias = Literal["none", "last", "all"]


def mlp(
    widths: Sequence[int],
    *,
    bias: bool = False,
    last_bias: bool | None = None,
    norm: bool = True,
    output_norm: str = "none",
    activation: type[nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """Linear, BatchNorm (`norm`), activation for all layers but the last: Linear and BatchNorm (`output_norm`).

    `widths` are channels, input first. `last_bias` None: as `bias`.
    """
    layers: list[nn.Module] = []
    for i, (wide, narrow) in enumerate(itertools.pairwise(widths)):
        last = i == len(widths) - 2
        layers.append(nn.Linear(wide, narrow, bias=bias if last_bias is None or not last else last_bias))
        if last:
            layers += [] if output_norm == "none" else [nn.BatchNorm1d(narrow, affine=output_norm == "affine")]
        else:
            layers += [nn.BatchNorm1d(narrow)] if norm else []
            layers.append(activation(inplace=True) if activation is nn.ReLU else activation())
    return nn.Sequential(*layers)


@dataclass(kw_only=True)
class Heads:
    """Projector g and predictor h. The defaults are SimSiam's (section 3 and its code)."""

    dim: int = 2048
    """Output of projector and predictor, channels."""
    projector_layers: int = 3
    """Linear layers of the projector."""
    projector_hidden: int | None = None
    """Hidden layers of the projector, channels. None: as wide as the backbone's features."""
    projector_bias: bool = False
    """Biases in the projector's Linear layers (a BatchNorm after them takes them away again)."""
    projector_norm: OutputNorm = "fixed"
    """BatchNorm on the projector's output: none, fixed (no scale and shift), affine."""
    predictor: bool = True
    """Use a predictor; without one p = z."""
    predictor_hidden: int = 512
    """Hidden layer of the predictor, channels."""
    predictor_bias: PredictorBias = "last"
    """Which Linear layers of the predictor have biases."""
    predictor_norm: OutputNorm = "none"
    """BatchNorm on the predictor's output: none, fixed (no scale and shift), affine."""
    norm_init: Literal["ones", "uniform"] = "ones"
    """Scale of the heads' BatchNorms at the start: 1, or uniform in (0, 1) as Fast-MoCo's code has it."""
    fix_pred_lr: bool = False
    """Keep the predictor's learning rate at its initial value, without warm-up (SimSiam section 4.2)."""

    def validate_heads(self) -> None:
        """Raise UserError for widths that make no network."""
        at_least(self, 1, "dim", "projector_layers", "projector_hidden", "predictor_hidden")


def init_like_vit(module: nn.Module) -> None:
    """Linear weights from a truncated normal of std 0.02, biases 0 (DINO's heads, and all of SSLight's)."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def make_heads(width: int, heads: Heads) -> tuple[nn.Module, nn.Module]:
    """Projector g and predictor h (nn.Identity without one) for features of `width` channels."""
    hidden = [heads.projector_hidden or width] * (heads.projector_layers - 1)
    projector = mlp([width, *hidden, heads.dim], bias=heads.projector_bias, output_norm=heads.projector_norm)
    predictor: nn.Module = nn.Identity()
    if heads.predictor:
        predictor = mlp(
            [heads.dim, heads.predictor_hidden, heads.dim],
            bias=heads.predictor_bias == "all",
            last_bias=heads.predictor_bias != "none",
            output_norm=heads.predictor_norm,
        )
    if heads.norm_init == "uniform":
        for m in (*projector.modules(), *predictor.modules()):
            if isinstance(m, nn.BatchNorm1d) and m.affine:
                nn.init.uniform_(m.weight)
    return projector, predictor


def head_groups(method: nn.Module) -> list[dict]:
    """`param_groups()` of a method with `backbone`, `projector`, `predictor` and `Heads` options in `config`."""
    predictor = list(method.predictor.parameters())
    inside = {id(p) for p in predictor}
    rest = [p for p in method.parameters() if id(p) not in inside and p.requires_grad]
    return [
        {"params": rest, "fixed_lr": False},
        {"params": predictor, "fixed_lr": method.config.fix_pred_lr},
    ]


# ------------------------------------------------------------------ BatchNorm groups


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
            count *= dist.size()
            mean_R, var_R = dist.gather_with_grad(torch.stack([mean, var])[None]).unbind(1)
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
        return self.sync and dist.size() > 1

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
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm)]
    if views > 1 and net.training and not all(isinstance(m, GroupedBatchNorm) for m in norms):
        return torch.cat([call(rows) for rows in joined(pieces).chunk(views)])

    def forward(x: Tensor) -> Tensor:
        for m in norms:
            m.views, m.parts = views, parts
        try:
            return call(x)
        finally:
            for m in norms:
                m.views = m.parts = 1

    micro = getattr(net, "micro_batches", None)
    if micro is not None and net.training and sum(map(len, pieces)) > views * parts * micro.images:
        return micro(forward, pieces, views * parts)
    return forward(joined(pieces))


def joined(pieces: Sequence[Tensor]) -> Tensor:
    """torch.cat, but a single tensor as it is."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def encode(net: nn.Module, views: Sequence[Tensor]) -> Tensor:
    """Features [K, B, D] of views of any sizes: neighbours of one size go through the network in one pass, each with
    BatchNorm statistics of its own (SimSiam's code encodes view after view)."""
    return _encode(net, views, lambda num: (num, 1))


def encode_together(net: nn.Module, views: Sequence[Tensor]) -> Tensor:
    """`encode` with BatchNorm that sees neighbouring views of one size as one batch (SwAV's and DINO's multi-crop)."""
    return _encode(net, views, lambda num: (1, num))


def _encode(net: nn.Module, views: Sequence[Tensor], layout: Callable[[int], tuple[int, int]]) -> Tensor:
    features = []
    for _, alike in itertools.groupby(views, key=lambda x: x.shape):
        alike = list(alike)
        features.append(in_groups(net, alike, *layout(len(alike))))
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
    the batch changes, which matters with `split_batch_norm`.
    """
    with torch.no_grad():
        everything = dist.gather(x)
        order = dist.same_permutation(len(everything), x.device)
        mine = order[dist.own_rows(len(x), x.device)]
        rows = dist.gather(in_groups(net, everything[mine].contiguous(memory_format=torch.channels_last), 1))
        back = torch.empty_like(rows)
        back[order] = rows
        return back[dist.own_rows(len(x), x.device)]


# ------------------------------------------------------------------ prototypes, memory


class WeightNormLinear(nn.Module):
    """Inner products with unit rows times a length g per row, which is 1 unless `trainable` (DINO's last layer).

    [..., D] -> [..., P]. g has one axis, so that it counts among the parameters without weight decay.
    """

    def __init__(self, in_features: int, out_features: int, *, trainable: bool):
        super().__init__()
        self.weight = nn.Linear(in_features, out_features, bias=False).weight  # its lengths set how fast rows turn
        self.length = nn.Parameter(torch.ones(out_features)) if trainable else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, F.normalize(self.weight, dim=1))
        return out if self.length is None else out * self.length


class Queue(nn.Module):
    """The last `size` rows pushed, first in first out; at the start random unit vectors (MoCo's code).

    Its state is in the checkpoint. Writing wraps around, and no index is read back from the device.
    """

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.register_buffer("rows", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("next", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, x_ND: Tensor) -> None:
        """Replace the oldest rows, by the last ones of `x_ND` if it has more than fit. Rows are stored as they are."""
        x_ND = x_ND.detach()[-len(self.rows) :].to(self.rows.dtype)
        places = (self.next + torch.arange(len(x_ND), device=self.next.device)) % len(self.rows)
        self.rows.index_copy_(0, places, x_ND)
        self.next.add_(len(x_ND)).remainder_(len(self.rows))
