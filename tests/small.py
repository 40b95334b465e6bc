"""Every method, found by its name and made small enough for a step to take hundredths of a second.

Nothing here names a method: options are set where the method has them, so that a new file in fastssl/methods is tested
as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock

from fastssl import methods
from fastssl.config import schema as configs
from fastssl.config.schema import RunConfig
from fastssl.progress import Progress
from fastssl.training import log as logs
from fastssl.training.build import make_views
from fastssl.training.step import Step
from loaders import Batch, ViewSpec

OPTIONS = {
    "dim": 32,
    "projector_hidden": 32,
    "predictor_hidden": 16,
    "queue_size": 64,
    "prototypes": 32,
    "local_size": 32,
}


# Flags of a small FastSiam run; training on the 48 images of `beton` has six steps per epoch.
SMALL = ["--backbone", "resnet18", "--size", "32", "--batch-size", "8", "--dim", "32", "--predictor-hidden", "8"]


class TinyResNet(torchvision.models.ResNet):
    """torchvision's ResNet with one block per stage and an eighth of the channels: images to 64 features."""

    width = 64

    def __init__(self):
        super().__init__(BasicBlock, [1, 1, 1, 1])
        self.fc = nn.Identity()

    def _make_layer(self, block, planes, blocks, stride=1, dilate=False):
        return super()._make_layer(block, planes // 8, blocks, stride, dilate)


def has(config: RunConfig, field: str) -> bool:
    """Whether the method has this option."""
    return field in {f.name for f in dataclasses.fields(config.method_options)}


def config_of(name: str, *, size: int = 32, backbone: str = "resnet18", **options: object) -> RunConfig:
    """The configuration of method `name` with small heads and these `options`, all of which it must have."""
    config = configs.typed_config(name)()
    config.model.method, config.model.backbone = name, backbone
    config.data.size, config.data.blur = size, 0.0
    for field, value in (OPTIONS | options).items():
        if has(config, field):
            setattr(config.method_options, field, value)
        elif field in options:
            raise TypeError(f"{name} has no option {field}")
    return config


def cases(addons: Iterable[dict[str, object]], active: dict[str, object]) -> dict[str, tuple[str, dict[str, object]]]:
    """Every method with each of the add-ons' options that it has, and those of `active`: label to name and options."""
    found = {}
    for name in methods.available():
        config = config_of(name)
        common = {option: value for option, value in active.items() if has(config, option)}
        for options in addons:
            if all(has(config, option) for option in options):
                label = " ".join([name, *(f"{option}={value}" for option, value in options.items())])
                found[label] = (name, common | options)
    return found


def method_of(config: RunConfig) -> nn.Module:
    """The method on a `TinyResNet`, with the same weights at every call."""
    torch.manual_seed(1)
    net = TinyResNet().to(memory_format=torch.channels_last)
    return methods.load(config.model.method).Method(net, net.width, config.method_options)


def batch_of(spec: ViewSpec, B: int = 8, seed: int = 0) -> Batch:
    """Normally distributed views of the sizes that `spec` asks for, tiles left to the method."""
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn(B, 3, size, size, generator=generator) for size in spec.sizes]
    views = [view.contiguous(memory_format=torch.channels_last) for view in views]
    return Batch(views, None, torch.arange(B), torch.zeros(B, dtype=torch.int64))


def made(name: str, B: int = 8, **options: object) -> tuple[RunConfig, nn.Module, Batch]:
    """Configuration, method and a batch of what it asks for."""
    config = config_of(name, **options)
    config.method_options.validate()
    return config, method_of(config), batch_of(make_views(config), B)


def losses(folder: Path) -> dict[int, float]:
    """The loss that a run logged of each step."""
    return {e["step"]: e["loss"] for e in logs.read_metrics(folder / logs.METRICS) if "loss" in e}


def forbid_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch raise if a training step waits for the GPU, from the third step on: the first ones compile."""
    take = Step.__call__

    def checked(self: Step, batch: Batch, progress: Progress) -> object:
        torch.cuda.set_sync_debug_mode("error" if progress.step >= 2 else "default")
        try:
            return take(self, batch, progress)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Step, "__call__", checked)
