"""Backbones."""

from __future__ import annotations

import pytest
import torch
import torchvision

from fastssl.nn import backbone, check_size
from loaders import UserError


@pytest.mark.parametrize(("name", "width"), [("resnet18", 512), ("resnet34", 512), ("resnet50", 2048)])
def test_resnets_have_torchvisions_names(name: str, width: int) -> None:
    net, found = backbone(name)
    assert found == width == check_size(name, net, 32)
    reference = getattr(torchvision.models, name)()
    reference.fc = torch.nn.Identity()
    reference.load_state_dict(net.state_dict(), strict=True)


def test_zero_init_residual() -> None:
    net, _ = backbone("resnet18", zero_init_residual=True)
    assert all((block.bn2.weight == 0).all() for block in net.layer3)
    net, _ = backbone("resnet18", zero_init_residual=False)
    assert all((block.bn2.weight == 1).all() for block in net.layer3)


def test_cifar_stem_keeps_resolution() -> None:
    net, width = backbone("resnet18-cifar")
    sizes = {}
    net.layer1.register_forward_hook(lambda _m, _i, out: sizes.update(layer1=out.shape[-1]))
    net.layer4.register_forward_hook(lambda _m, _i, out: sizes.update(layer4=out.shape[-1]))
    assert net.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, width) == (1, 512)
    assert sizes == {"layer1": 32, "layer4": 4}
    net(torch.zeros(1, 3, 16, 16))  # adaptive pooling takes tiles


@pytest.mark.parametrize(
    ("name", "size"),
    [("timm/resnet18", 32), ("timm/vit_tiny_patch16_224", 224), ("timm/mobilenetv3_small_100", 64)],
)
def test_timm_models_by_name(name: str, size: int) -> None:
    net, width = backbone(name)
    assert check_size(name, net, size) == width
    assert net.eval()(torch.zeros(2, 3, size, size)).shape == (2, width)


def test_unknown_backbones_name_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'resnet50'"):
        backbone("resnet_50")
    with pytest.raises(UserError, match="timm/resnet50"):
        backbone("timm/resnet5")


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="at least 32 px"):
        check_size("resnet18", backbone("resnet18")[0], 31)
    with pytest.raises(UserError, match="does not take images of 100 px"):
        check_size("timm/vit_tiny_patch16_224", backbone("timm/vit_tiny_patch16_224")[0], 100)
