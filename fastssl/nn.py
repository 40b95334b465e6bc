"""Backbones and heads."""

from __future__ import annotations

import difflib

import torch
import torchvision
from torch import Tensor, nn

from loaders.errors import UserError, unknown

RESNETS = ("resnet18", "resnet34", "resnet50")
CIFAR_RESNET18 = "resnet18-cifar"
# Smallest input side, px: total stride 32 (8 for the CIFAR stem) must leave at least one position of features.
_MIN_SIZE = dict.fromkeys(RESNETS, 32) | {CIFAR_RESNET18: 8}


def backbone(name: str, *, zero_init_residual: bool = True) -> tuple[nn.Module, int]:
    """A randomly initialised backbone that maps [B, 3, S, S] to pooled features [B, D], and its D.

    Names: resnet18, resnet34, resnet50 (torchvision), resnet18-cifar (3x3 stride-1 stem, no max-pool), or timm/NAME.
    `zero_init_residual` starts every residual branch at zero (Goyal et al. 2017, section 5.1), as SimSiam does.
    State dicts carry torchvision's (timm's) names. Raises UserError for an unknown name.
    """
    if name in RESNETS or name == CIFAR_RESNET18:
        net = getattr(torchvision.models, name.removesuffix("-cifar"))(zero_init_residual=zero_init_residual)
        width = net.fc.in_features
        net.fc = nn.Identity()
        if name == CIFAR_RESNET18:
            net.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
            nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
            net.maxpool = nn.Identity()
        return net, width
    if name.startswith("timm/"):
        return _timm(name.removeprefix("timm/"), zero_init_residual)
    raise unknown("backbone", name, [*RESNETS, CIFAR_RESNET18, "timm/NAME"])


def _timm(name: str, zero_init_residual: bool) -> tuple[nn.Module, int]:
    import timm  # slow to import: only who asks for it pays

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f", did you mean {' or '.join('timm/' + n for n in near)}?" if near else ""
        raise UserError(f"timm has no model {name!r}{hint} (timm.list_models() names them all)")
    try:  # only residual networks take the option
        net = timm.create_model(name, num_classes=0, zero_init_last=zero_init_residual)
    except TypeError:
        net = timm.create_model(name, num_classes=0)
    return net, getattr(net, "head_hidden_size", None) or net.num_features


def check_size(name: str, net: nn.Module, size: int) -> int:
    """D of the [B, D] features that `net` gives for images of `size` px, found by running it on two of them.

    Raises UserError if it does not take images of that size.
    """
    smallest = _MIN_SIZE.get(name, 1)
    if size < smallest:
        raise UserError(f"--size {size} is too small for {name}: it needs at least {smallest} px")
    was_training = net.training
    try:
        with torch.no_grad():
            return net.eval()(torch.zeros(2, 3, size, size)).shape[-1]
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n", 1)[0]
        raise UserError(f"{name} does not take images of {size} px (--size): {reason}") from error
    finally:
        net.train(was_training)


def linear_bn(in_features: int, out_features: int, *, relu: bool, affine: bool = True) -> list[nn.Module]:
    """Linear (no bias: BatchNorm takes it away again), BatchNorm and, if asked for, ReLU."""
    layers: list[nn.Module] = [
        nn.Linear(in_features, out_features, bias=False),
        nn.BatchNorm1d(out_features, affine=affine),
    ]
    return layers + [nn.ReLU(inplace=True)] if relu else layers


def simsiam_projector(width: int, dim: int, *, layers: int = 3, affine: bool = False) -> nn.Sequential:
    """SimSiam's projection MLP (section 3, and its code): width -> width -> width -> dim, BN on every layer.

    The last BN has no affine parameters. `layers=2, affine=True` is the CIFAR head (appendix D): width -> dim -> dim.
    """
    if layers == 2:
        return nn.Sequential(*linear_bn(width, dim, relu=True), *linear_bn(dim, dim, relu=False, affine=affine))
    hidden = [m for _ in range(layers - 1) for m in linear_bn(width, width, relu=True)]
    return nn.Sequential(*hidden, *linear_bn(width, dim, relu=False, affine=affine))


def simsiam_predictor(dim: int, hidden: int) -> nn.Sequential:
    """SimSiam's prediction MLP: a bottleneck dim -> hidden -> dim, no BN on its output, which has a bias."""
    return nn.Sequential(*linear_bn(dim, hidden, relu=True), nn.Linear(hidden, dim))


def encode(net: nn.Module, head: nn.Module, views: list[Tensor]) -> Tensor:
    """z_KBD = head(net(view)) for each view by itself, so that each has its own BatchNorm statistics."""
    return torch.stack([head(net(view)) for view in views])
