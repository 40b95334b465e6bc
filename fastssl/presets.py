"""Named recipes: `fastssl-train NAME --data TRAIN.beton`.

Each is a function that returns a whole configuration; its docstring gives source and expectation and is what
`fastssl-train --list` prints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastssl.config import Config, Data, Model, Optim, Run, typed_config
from loaders.errors import unknown


def _make(method: str, options: dict[str, Any] | None = None, **fields: Any) -> Config:
    """A Config of `method` from leaf fields, each put in its group."""
    groups: dict[str, dict[str, Any]] = {"data": {}, "model": {"method": method}, "optim": {}, "run": {}}
    types = {"data": Data, "model": Model, "optim": Optim, "run": Run}
    for name, value in fields.items():
        group = next(g for g, t in types.items() if name in t.__dataclass_fields__)
        groups[group][name] = value
    made = typed_config(method)
    options_type = made.__dataclass_fields__["method_options"].type
    return made(
        method_options=options_type(**(options or {})), **{g: types[g](**values) for g, values in groups.items()}
    )


# SimSiam's rate is given at 256 images, FastSiam's at 32: each preset quotes its paper.
_SIMSIAM_LR = {"lr": 0.05, "lr_batch_size": 256}
_FASTSIAM_LR = {"lr": 0.125, "lr_batch_size": 32}
# Small images: heads of appendix D of SimSiam (2 layers), its weight decay, its network.
_CIFAR = {"size": 32, "recipe": "cifar", "backbone": "resnet18-cifar", "weight_decay": 5e-4}
# Ten classes of ImageNet on a CPU: small network, small views without blur, FastSiam's small batch and large rate.
_IMAGENETTE = {"size": 64, "blur": 0.0, "backbone": "resnet18", "batch_size": 32, "schedule": "step", **_FASTSIAM_LR}
_CIFAR_HEAD = {"projector_layers": 2}


def fastsiam_imagenet_25ep() -> Config:
    """FastSiam section 4.1: ResNet-50, 4 views, batch 32, one GPU; COCO box AP 39.7 (ImageNet labels: 39.7)."""
    return _make("fastsiam", backbone="resnet50", epochs=25, batch_size=32, **_FASTSIAM_LR)


def fastsiam_imagenet_10ep() -> Config:
    """FastSiam section 4.1, the short run: COCO box AP 38.9 (SimSiam after 100 epochs: 38.4)."""
    return _make("fastsiam", backbone="resnet50", epochs=10, batch_size=32, **_FASTSIAM_LR)


def simsiam_imagenet_100ep() -> Config:
    """SimSiam table 1: ResNet-50, batch 256, linear top-1 68.3 % (the paper used 8 GPUs)."""
    return _make("simsiam", backbone="resnet50", epochs=100, batch_size=256, **_SIMSIAM_LR)


def fastsiam_imagenette_12ep() -> Config:
    """FastSiam on ten ImageNet classes at 64 px, ResNet-18, for a CPU: kNN 51.3 % (random initialisation 30.8 %)."""
    return _make("fastsiam", epochs=12, **_IMAGENETTE)


def simsiam_imagenette_24ep() -> Config:
    """SimSiam with as many view passes as fastsiam-imagenette-12ep: kNN 50.6 %."""
    return _make("simsiam", epochs=24, **_IMAGENETTE)


def fastsiam_cifar10_200ep() -> Config:
    """FastSiam with SimSiam's CIFAR head and schedule (appendix D); kNN .906 in lightly's benchmark (batch 128)."""
    return _make("fastsiam", _CIFAR_HEAD, epochs=200, batch_size=128, lr=0.06, lr_batch_size=128, **_CIFAR)


def simsiam_cifar10_800ep() -> Config:
    """SimSiam appendix D: 800 epochs at batch 512, rate 0.03 per 256; kNN .904 in lightly's benchmark."""
    return _make("simsiam", _CIFAR_HEAD, epochs=800, batch_size=512, lr=0.03, lr_batch_size=256, **_CIFAR)


def demo() -> Config:
    """FastSiam on 4,000 generated shapes: 48 k views of 48 px in minutes on two CPU cores; what `make demo` runs."""
    # Many small steps and narrow heads: with so few images the number of steps is what counts.
    return _make(
        "fastsiam",
        {"projector_layers": 2, "dim": 512, "hidden": 128},
        backbone="resnet18",
        size=48,
        blur=0.0,  # sigma up to 2 px leaves little of a 48 px view
        epochs=3,
        batch_size=16,
        lr=0.125,
        lr_batch_size=16,
        schedule="step",
        knn_every=1,
    )


_FACTORIES: tuple[Callable[[], Config], ...] = (
    fastsiam_imagenet_25ep,
    fastsiam_imagenet_10ep,
    simsiam_imagenet_100ep,
    fastsiam_imagenette_12ep,
    simsiam_imagenette_24ep,
    fastsiam_cifar10_200ep,
    simsiam_cifar10_800ep,
    demo,
)
PRESETS: dict[str, Callable[[], Config]] = {f.__name__.replace("_", "-"): f for f in _FACTORIES}


def load(name: str) -> Config:
    """The configuration of preset `name`. Raises UserError for an unknown one."""
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    config = PRESETS[name]()
    config.preset = name
    return config
