"""SSLight: small networks and re-balanced crops. Tan, Saleh and Martinez, ICLR 2023, and the code.

    fastssl-train dino-sslight-mnv2-imagenet-200ep --data train.beton

Published: linear 68.3 % on ImageNet with DINO and MobileNetV2, 66.2 % with the usual crops (-multicrop-). Cost: 2,050 M
views, 39.7 hours, or more: depth-wise networks do not reach the assumed share of a card.
"""

from collections.abc import Mapping
from typing import Any

from fastssl.config.presets.swav import CNN_CROPS
from fastssl.config.recipe import Preset, preset

_VIT_CROPS = {"crop_min": 0.25, "local_scale": (0.05, 0.25), "local_size": 96, "num_local": 10, "alpha": None}
_REBALANCED = {"crop_min": 0.3, "local_scale": (0.05, 0.3), "local_size": 128, "alpha": 0.4}

_CNN = {
    "zero_init_residual": False,
    "batch_size": 1024,
    "optimizer": "lars",
    "lr": 0.48,
    "lr_batch_size": 256,
    "min_lr": 0.0048,
    "weight_decay": 1e-6,
    "no_decay": "1d+depthwise",
    "schedule": "step",
    "warmup_epochs": 10.0,
    "sync_bn": True,
}
_DINO_CNN = _CNN | {"recipe": "byol", "prototypes": 4096, "teacher_temperature": 0.07, "teacher_warmup_epochs": 50}
_DINO_VIT = {
    "recipe": "byol",
    "batch_size": 1024,
    "drop_path": 0.1,
    "optimizer": "adamw",
    "lr": 5e-4,
    "lr_batch_size": 256,
    "min_lr": 1e-5,
    "weight_decay": 0.04,
    "weight_decay_end": 0.4,
    "no_decay": "1d",
    "schedule": "step",
    "warmup_epochs": 10.0,
    "prototypes": 65536,
    "projector_bn": False,
    "train_last_norm": True,
    "decay_last_norm": True,
    "teacher_temperature": 0.07,
    "teacher_warmup_epochs": 30,
}
_MOCO = _CNN | {"recipe": "byol", "projector_hidden": 2048, "projector_init": "vit"}
_SWAV = _CNN | {"recipe": "swav", "lr": 0.3, "warmup_start": 0.0625, "projector_hidden": 4096, "queue_size": 3072}
_SWAV |= {"projector_init": "normal"}

_UNCONFIGURED = "The code has no configuration for this network: ours is that of its like. "


def _rows(
    method: str, short: str, backbone: str, recipe: Mapping[str, Any], linear: tuple[str, str], ours: str = ""
) -> tuple[Preset, Preset]:
    """A network with the usual crops and with the re-balanced ones; `linear`: top-1 of both, in %."""
    crops = _VIT_CROPS if short.startswith("vit") else CNN_CROPS
    return (
        preset(
            f"{method}-multicrop-{short}-imagenet-200ep",
            "SSLight, its baseline",
            f"linear {linear[0]} %",
            recipe,
            crops,
            backbone=backbone,
            notes=ours + "Re-balanced weights alone: --alpha 0.4.",
        ),
        preset(
            f"{method}-sslight-{short}-imagenet-200ep",
            "SSLight, code",
            f"linear {linear[1]} %",
            recipe,
            crops,
            _REBALANCED,
            backbone=backbone,
            notes=ours + "Beside the weights of pairs the crops' scales change, and the small ones' side: 128 px for "
            "96.",
        ),
    )


PRESETS = (
    *_rows("dino", "r18", "resnet18", _DINO_CNN, ("62.2", "65.7")),
    *_rows("dino", "r34", "resnet34", _DINO_CNN, ("67.7", "69.7")),
    *_rows("dino", "r50", "resnet50", _DINO_CNN, ("73.4", "73.4"), _UNCONFIGURED),
    *_rows("dino", "mnv2", "mobilenet_v2", _DINO_CNN, ("66.2", "68.3")),
    *_rows("mocov2", "mnv2", "mobilenet_v2", _MOCO, ("60.6", "61.6")),
    *_rows("swav", "mnv2", "mobilenet_v2", _SWAV, ("65.2", "67.3")),
    *_rows("dino", "vit-t32", "vit-t32", _DINO_VIT, ("55.4", "60.1"), _UNCONFIGURED),
    *_rows("dino", "vit-t16", "vit-t16", _DINO_VIT, ("66.7", "69.5")),
    *_rows("dino", "vit-s16", "vit-s16", _DINO_VIT, ("75.4", "76.1"), _UNCONFIGURED),
)
