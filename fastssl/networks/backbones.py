"""Backbones: networks from images to pooled features, by name.

Legend: B images, S side of an image in px, D features, H x W positions of a feature map.
"""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor, nn

from loaders.errors import UserError, unknown

# Smallest side, px, at which the last of the total strides of 32 (8 behind the CIFAR stem) has something to see.
_MIN_SIZE = {
    **dict.fromkeys(("resnet18", "resnet34", "resnet50"), 32),
    **dict.fromkeys(("resnet18-cifar", "resnet34-cifar", "resnet50-cifar"), 8),
    "mobilenet_v2": 32,
}
# timm's model and the side of a patch, px. Width 192 with 3 heads, and 384 with 6; 12 blocks each (DeiT, table 1).
_VITS = {
    "vit-t32": ("vit_tiny_patch16_224", 32),
    "vit-t16": ("vit_tiny_patch16_224", 16),
    "vit-s16": ("vit_small_patch16_224", 16),
}
NAMES = (*_MIN_SIZE, *_VITS)


def backbone(
    name: str, *, size: int = 224, zero_init_residual: bool = True, drop_path: float = 0.0
) -> tuple[nn.Module, int]:
    """A randomly initialised backbone that maps [B, 3, S, S] to pooled features [B, D], and its D.

    Names, and where the names in their state dicts are from:
    - resnet18, resnet34, resnet50 (torchvision), and the same with -cifar: 3x3 stride-1 stem, no max-pool
    - mobilenet_v2 (torchvision): width 1.0, 1280 features
    - vit-t32, vit-t16, vit-s16 (timm's names): DINO's ViT-Tiny and ViT-Small with patches of 32 and 16 px, class token
      as features
    - timm/NAME: any model of timm, pooled as that model does

    `size` is the side of the run's images, px: ViTs learn positions for it. They take other sizes, too, by bicubic
    resizing of these positions, as do those models of timm that can (`dynamic_img_size`).
    `zero_init_residual` starts every residual branch at zero (Goyal et al. 2017, section 5.1), as SimSiam does, in
    networks that know the option. `drop_path` is the probability that an image skips the last residual block in
    training (Huang et al. 2016), falling linearly to 0 at the first one.

    Raises UserError for an unknown name, a size that does not fit, and `drop_path` where there is nothing to drop.
    """
    if not 0 <= drop_path < 1:
        raise UserError(f"--drop-path {drop_path}: a probability, in [0, 1)")
    if name.startswith("resnet") and name in _MIN_SIZE:
        net = _resnet(name, zero_init_residual)
    elif name == "mobilenet_v2":
        import torchvision  # slow to import, as timm is: --help does without them

        net = torchvision.models.mobilenet_v2()
        net.classifier = nn.Identity()
    elif name in _VITS:
        from fastssl.networks.vit import like_dino

        model, patch = _VITS[name]
        net = like_dino(_timm(name, model, size, patch_size=patch, drop_path_rate=drop_path))
    elif name.startswith("timm/"):
        # Only residual networks know the first option.
        options = {"zero_init_last": zero_init_residual, "drop_path_rate": drop_path or None}
        net = _timm(name, name.removeprefix("timm/"), size, **options)
    else:
        raise unknown("backbone", name, [*NAMES, "timm/NAME"])
    if drop_path and not any(getattr(m, "drop_prob", 0) for m in net.modules()):
        raise UserError(f"--drop-path {drop_path}: {name} has none; use 0, a vit-* or a model of timm that has it")
    return net, check_size(name, net, size)


def _resnet(name: str, zero_init_residual: bool) -> nn.Module:
    import torchvision

    net = getattr(torchvision.models, name.removesuffix("-cifar"))(zero_init_residual=zero_init_residual)
    net.fc = nn.Identity()
    if name.endswith("-cifar"):
        net.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    return net


def _timm(name: str, model: str, size: int, **options: Any) -> nn.Module:
    """A model of timm without classifier, with those of the options that it knows."""
    import timm  # slow to import: only who asks for it pays

    if not timm.is_model(model):
        near = difflib.get_close_matches(model, timm.list_models(), n=3)
        hint = f", did you mean {' or '.join('timm/' + n for n in near)}?" if near else ""
        raise UserError(f"timm has no model {model!r}{hint} (timm.list_models() names them all)")
    options |= {"img_size": size, "dynamic_img_size": True}
    while True:
        try:
            return timm.create_model(model, num_classes=0, **options)
        except TypeError as error:  # timm cannot be asked beforehand
            refused = [option for option in options if f"'{option}'" in str(error)]
            if not refused:
                raise
            for option in refused:
                del options[option]
        except (RuntimeError, AssertionError, ValueError, ZeroDivisionError) as error:
            raise _misfit(name, None, size, "--size", error) from error


def check_size(name: str, net: nn.Module, size: int, what: str = "--size") -> int:
    """D of the [B, D] features that `net` gives for images of `size` px, found by running it on two of them.

    Raises UserError if it does not take images of that size; `what` says there which images they are, or which flag
    sets their size.
    """
    # Below it the last strides run on one pixel, whose weight gradients torch 2.15 leaves unwritten on a CPU in bf16.
    if size < (smallest := _MIN_SIZE.get(name, 1)):
        raise UserError(f"{size} px ({what}) are too few for {name}: it needs at least {smallest} px")
    was_training = net.training
    try:
        with torch.no_grad():
            return net.eval()(torch.zeros(2, 3, size, size)).shape[-1]
    except (RuntimeError, AssertionError) as error:
        raise _misfit(name, net, size, what, error) from error
    finally:
        net.train(was_training)


def _misfit(name: str, net: nn.Module | None, size: int, what: str, error: Exception) -> UserError:
    reason = (str(error) or type(error).__name__).split("\n", 1)[0]
    patch = getattr(getattr(net, "patch_embed", None), "patch_size", None)
    patch = _VITS[name][1] if name in _VITS else patch[0] if isinstance(patch, tuple) else patch
    if patch and size % patch:
        below = size // patch * patch
        fitting = f"{below} or {below + patch}" if below else f"{patch}"
        reason = f"use a multiple of its patches' {patch} px, such as {fitting}"
    return UserError(f"{name} does not take images of {size} px ({what}): {reason}")


def feature_map(net: nn.Module, x: Tensor) -> Tensor:
    """Features before pooling, [B, D, H, W]: their mean over H and W is net(x).

    For the ResNets, MobileNetV2, and the models of timm that pool at their very end. Raises UserError for others: ViTs
    have no map, ConvNeXts and MobileNetV3s compute on behind the pooling.
    """
    from torchvision.models import MobileNetV2, ResNet

    if isinstance(net, ResNet):
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        return net.layer4(net.layer3(net.layer2(net.layer1(x))))
    if isinstance(net, MobileNetV2):
        return net.features(x)
    forward = getattr(net, "forward_features", None)  # of timm's models
    if forward is not None and not _computes_after_pooling(net):
        x = forward(x)
        # Some (Swin) have the channels last.
        if isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] == net.num_features:
            return x
    raise UserError(
        f"{type(net).__name__} has no feature map whose mean is its output: use a resnet*, mobilenet_v2 or "
        "a model of timm that ends in average pooling"
    )


def _computes_after_pooling(net: nn.Module) -> bool:
    head = getattr(net, "head", None)
    has_weights = isinstance(head, nn.Module) and next(head.parameters(), None) is not None
    return has_weights or getattr(net, "head_hidden_size", net.num_features) != net.num_features
