"""CIFAR-10 with a ResNet-18 for small images: lightly's benchmark, and SimSiam's appendix D.

    fastssl-train fastsiam-cifar10-200ep --data train.beton --val val.beton

Published by lightly: kNN 90.6 %. Cost: 40.0 M views, 2.39 hours.
"""

from collections.abc import Mapping
from typing import Any

from fastssl.config.recipe import Preset, preset

# Heads of SimSiam's appendix D (2 layers of 2048), its weight decay, its network.
_CIFAR = {"size": 32, "recipe": "cifar", "backbone": "resnet18-cifar", "weight_decay": 5e-4}
_HEADS = {"projector_layers": 2, "projector_hidden": 2048}
_LIGHTLY = _CIFAR | {"batch_size": 128, "lr": 0.06, "lr_batch_size": 128, "zero_init_residual": False}
_EMA = {"recipe": "cifar-byol", "ema": 0.99, "ema_schedule": "constant"}
_BYOL = _EMA | {"projector_hidden": 1024, "predictor_hidden": 1024, "sum_directions": False}
# lightly's heads have biases where no BatchNorm follows; its crops are bilinear.
_LIGHTLY_BYOL = _BYOL | {"projector_bias": "last", "predictor_bias": "last", "interpolation": "bilinear"}
_SWAV = {"optimizer": "adam", "lr": 1e-3, "weight_decay": 1e-6, "projector_hidden": 512}
_KNN = "k 200, T 0.1"
_NEARLY = "Ours: crops and colours as nearly as the recipes here have them."
_OURS = "All of it is ours: lightly's settings for the other methods, T 0.2."


def _lightly(name: str, knn: str, *shared: Mapping[str, Any], notes: str = "", **values: Any) -> Preset:
    """A row of lightly's benchmark; `knn`: top-1 of its best epoch, in %."""
    return preset(
        name, "lightly's benchmark", f"kNN {knn} % ({_KNN})", _LIGHTLY, *shared, notes=_NEARLY + notes, **values
    )


PRESETS = (
    preset(
        "simsiam-cifar10-800ep",
        "SimSiam, appendix D",
        f"kNN 90.4 % (lightly, rate 0.06; {_KNN})",
        _CIFAR | _HEADS | {"batch_size": 512, "lr": 0.03, "lr_batch_size": 256},
    ),
    preset(
        "fastsiam-cifar10-200ep",
        "lightly's benchmark",
        f"kNN 90.6 % ({_KNN})",
        _CIFAR | _HEADS | {"batch_size": 128, "lr": 0.06, "lr_batch_size": 128, "crop_min": 0.2},
        notes="Heads are SimSiam's. lightly's: --projector-norm affine --no-fix-pred-lr --no-zero-init-residual.",
    ),
    _lightly(
        "simsiam-cifar10-200ep",
        "81.9",
        _HEADS | {"projector_norm": "affine", "fix_pred_lr": False},
        crop_min=0.2,
        lr_batch_size=0,  # lightly does not scale it
        rows={"--batch-size 512": "kNN 76.4 %", "--batch-size 512 --epochs 800": "kNN 90.4 %"},
    ),
    _lightly("byol-cifar10-200ep", "86.9", _LIGHTLY_BYOL),
    _lightly(
        "mocov2-cifar10-200ep",
        "83.8",
        queue_size=4096,
        temperature=0.1,
        ema=0.99,
        symmetric=True,
        bn_splits=8,
    ),
    _lightly(
        "nnclr-cifar10-200ep",
        "83.4",
        projector_layers=2,
        queue_size=4096,
        temperature=0.2,
        notes=" So is T 0.2 (solo-learn's): lightly's loss is another, SimCLR's with neighbours at T 0.5.",
    ),
    _lightly("swav-cifar10-200ep", "81.2", _SWAV, crop_min=0.14, prototypes=512, freeze_epochs=0),
    _lightly("dino-cifar10-200ep", "84.0", _EMA, crop_min=0.4, projector_layers=2, prototypes=2048, freeze_epochs=0),
    preset("mocov3-cifar10-200ep", "ours", "none published", _LIGHTLY, _BYOL, temperature=0.2, notes=_OURS),
    preset(
        "fastmoco-cifar10-200ep",
        "ours",
        "none published",
        _LIGHTLY | {"crop_min": 0.2, "temperature": 0.2, "clip_norm": 1.0},
        notes=_OURS + " Heads and clipping are Fast-MoCo's; tiles have 16 px.",
    ),
)
