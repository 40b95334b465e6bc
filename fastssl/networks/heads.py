"""Projectors, predictors and prototypes: the heads that methods put on a backbone.

Legend: B images of this process, K views, D features, N rows of all processes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.conditions import above, given
from loaders.checks import Options, at_least

OutputNorm = Literal["none", "fixed", "affine"]  # BatchNorm on a head's output: none, without or with scale and shift
Bias = Literal["none", "hidden", "last", "all"]  # which Linear layers of a head have one


def mlp(
    widths: Sequence[int],
    *,
    bias: Bias = "none",
    norm: bool = True,
    output_norm: OutputNorm = "none",
    activation: type[nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """Linear, BatchNorm (`norm`), activation for all layers but the last: Linear and BatchNorm (`output_norm`).

    `widths` are channels, input first. `bias`: of the Linear layers, of the hidden ones or the last one only.
    """
    layers: list[nn.Module] = []
    for i, (wide, narrow) in enumerate(itertools.pairwise(widths)):
        last = i == len(widths) - 2
        layers.append(nn.Linear(wide, narrow, bias=bias in ("all", "last" if last else "hidden")))
        if last:
            layers += [] if output_norm == "none" else [nn.BatchNorm1d(narrow, affine=output_norm == "affine")]
        else:
            layers += [nn.BatchNorm1d(narrow)] if norm else []
            layers.append(activation(inplace=True) if activation is nn.ReLU else activation())
    return nn.Sequential(*layers)


@dataclass(kw_only=True)
class Heads(Options):
    """Projector g and predictor h. The defaults are SimSiam's (section 3 and its code)."""

    dim: int = 2048
    """Output of projector and predictor, channels."""
    projector_layers: int = 3
    """Linear layers of the projector."""
    projector_hidden: int | None = None
    """Hidden layers of the projector, channels. None: as wide as the backbone's features."""
    projector_bias: Bias = "none"
    """Which Linear layers of the projector have biases (a BatchNorm after one takes it away again)."""
    projector_norm: OutputNorm = "fixed"
    """BatchNorm on the projector's output: none, fixed (no scale and shift), affine."""
    predictor: bool = True
    """Use a predictor; without one p = z."""
    predictor_hidden: int = 512
    """Hidden layer of the predictor, channels."""
    predictor_bias: Bias = "last"
    """Which Linear layers of the predictor have biases."""
    predictor_norm: OutputNorm = "none"
    """BatchNorm on the predictor's output: none, fixed (no scale and shift), affine."""
    norm_init: Literal["ones", "uniform"] = "ones"
    """Scale of the heads' BatchNorms at the start: 1, or uniform in (0, 1) as Fast-MoCo's code has it."""
    fix_pred_lr: bool = False
    """Keep the predictor's learning rate at its initial value, without warm-up (SimSiam section 4.2)."""

    READ_IF = {"projector_hidden": above("projector_layers", 1)} | dict.fromkeys(
        ("predictor_hidden", "predictor_bias", "predictor_norm", "fix_pred_lr"), given("predictor")
    )

    def validate(self) -> None:
        """Raise UserError for widths that make no network."""
        super().validate()
        at_least(self, 1, "dim", "projector_layers", "projector_hidden", "predictor_hidden")


def init_linear(module: nn.Module, std: float, *, truncated: bool = False) -> None:
    """Start weights of Linear layers from a normal distribution, cut off at -2 and 2 if `truncated`, and biases at 0.

    DINO's heads and SSLight's of DINO and MoCo: truncated, std 0.02. SSLight's SwAV: std 0.01.
    """
    for m in module.modules():
        if isinstance(m, nn.Linear):
            (nn.init.trunc_normal_ if truncated else nn.init.normal_)(m.weight, std=std)
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
            bias=heads.predictor_bias,
            output_norm=heads.predictor_norm,
        )
    if heads.norm_init == "uniform":
        for m in (*projector.modules(), *predictor.modules()):
            if isinstance(m, nn.BatchNorm1d) and m.affine:
                nn.init.uniform_(m.weight)
    return projector, predictor


def head_groups(method: nn.Module, predictor: nn.Module, fix_pred_lr: bool) -> list[dict[str, Any]]:
    """`param_groups()` of a method whose predictor may keep its initial learning rate."""
    apart = list(predictor.parameters())
    inside = {id(p) for p in apart}
    rest = [p for p in method.parameters() if id(p) not in inside and p.requires_grad]
    return [{"params": rest, "fixed_lr": False}, {"params": apart, "fixed_lr": fix_pred_lr}]


class WeightNormLinear(nn.Module):
    """Inner products with unit rows times a length g per row, which is 1 unless `trainable` (DINO's last layer).

    [..., D] -> [..., P]. g [P] has one axis and counts among the parameters without weight decay, unless it `decays`:
    then it is [P, 1], as in DINO's code.
    """

    def __init__(self, in_features: int, out_features: int, *, trainable: bool, decays: bool = False):
        super().__init__()
        self.weight = nn.Linear(in_features, out_features, bias=False).weight  # its lengths set how fast rows turn
        self.length = nn.Parameter(torch.ones((out_features, 1) if decays else out_features)) if trainable else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, F.normalize(self.weight, dim=1))
        return out if self.length is None else out * self.length.flatten()
