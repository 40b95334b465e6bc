"""Heads, BatchNorm groups and the queue: what methods are built from besides a backbone.

Legend: B images of this process, K views, D features, N rows of all processes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl import dist
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


def encode(net: nn.Module, head: nn.Module, views: Iterable[Tensor]) -> Tensor:
    """z_KBD = head(net(view)) for each view by itself, so that each has its own BatchNorm statistics."""
    return torch.stack([head(net(view)) for view in views])


def encode_together(net: nn.Module, views: Sequence[Tensor]) -> Tensor:
    """Features [K, B, D]: neighbouring views of one size go through the network together, so that BatchNorm sees them
    as one batch (SwAV's and DINO's multi-crop)."""
    features, start = [], 0
    while start < len(views):
        stop = start + 1
        while stop < len(views) and views[stop].shape == views[start].shape:
            stop += 1
        features.append(net(torch.cat([*views[start:stop]])))
        start = stop
    return torch.cat(features).unflatten(0, (len(views), -1))


def split_batch_norm(module: nn.Module, splits: int) -> nn.Module:
    """Replace every BatchNorm in `module` by one that normalises each of `splits` parts of the batch by itself.

    It stands in for as many GPUs without synchronised BatchNorm: MoCo's shuffled keys need them (MoCo section 3.3).
    """
    need_plain_batch_norm(module, "--bn-splits")
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm):
                setattr(parent, name, SplitBatchNorm(child, splits))
    return module


def need_plain_batch_norm(module: nn.Module, flag: str) -> None:
    """Raise UserError if a BatchNorm in `module` does more than that (some of timm's activate, too): replacing it would
    lose the rest."""
    for m in module.modules():
        if isinstance(m, _BatchNorm) and type(m) not in (nn.BatchNorm1d, nn.BatchNorm2d):
            raise UserError(
                f"{flag} replaces BatchNorm layers, but the network's {type(m).__name__} does more: leave it out"
            )


class SplitBatchNorm(nn.BatchNorm2d):
    """State and evaluation of the BatchNorm that it replaces."""

    def __init__(self, norm: _BatchNorm, splits: int):
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.load_state_dict(norm.state_dict())
        if norm.affine:
            self.weight.requires_grad_(norm.weight.requires_grad)
            self.bias.requires_grad_(norm.bias.requires_grad)
        self.splits = splits

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        self.num_batches_tracked.add_(1)
        # The parts become channels of their own.
        parts = x.unflatten(0, (-1, self.splits)).flatten(1, 2)
        mean, var = self.running_mean.repeat(self.splits), self.running_var.repeat(self.splits)
        parts = F.batch_norm(parts, mean, var, None, None, True, self.momentum, self.eps)
        with torch.no_grad():
            self.running_mean.copy_(mean.view(self.splits, -1).mean(0))
            self.running_var.copy_(var.view(self.splits, -1).mean(0))
        x = parts.unflatten(1, (self.splits, -1)).flatten(0, 1)
        if not self.affine:
            return x
        shape = (1, -1, *[1] * (x.ndim - 2))
        return (x * self.weight.view(shape) + self.bias.view(shape)).to(x.dtype)


def encode_shuffled(net: nn.Module, x: Tensor) -> Tensor:
    """net(x) computed with the images of all processes dealt out anew, rows back in their places, without gradient.

    BatchNorm then cannot tell a key by the company it is in (MoCo section 3.3). In one process only the order within
    the batch changes, which matters with `split_batch_norm`.
    """
    with torch.no_grad():
        everything = dist.gather(x)
        order = dist.same_permutation(len(everything), x.device)
        mine = order[dist.own_rows(len(x), x.device)]
        rows = dist.gather(net(everything[mine].contiguous(memory_format=torch.channels_last)))
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
