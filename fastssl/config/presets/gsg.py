"""Guided stop-gradient on SimSiam and BYOL: Lee and Lee, NeurIPS 2023 (GSG), with the baselines of its tables.

    fastssl-train simsiam-guided-imagenet-100ep --data train.beton

Published: kNN 58.4 %, linear 69.4 % on ImageNet; without guidance 51.7 %, 67.9 %. Cost: 512 M views, 223 hours. The
paper gives no code for CIFAR-10, where the network is a ResNet-18.
"""

from fastssl.config.presets.simsiam import SIMSIAM_LR
from fastssl.config.recipe import Preset, preset

_IMAGENET = SIMSIAM_LR | {"recipe": "imagenet", "batch_size": 512, "fix_pred_lr": True, "sync_bn": True}
_CIFAR = {
    "recipe": "cifar",
    "size": 32,
    "backbone": "resnet18-cifar",
    "batch_size": 512,
    "lr": 0.06,
    "lr_batch_size": 512,
    "weight_decay": 5e-4,
    "schedule": "constant",
    "projector_layers": 2,
    "projector_hidden": 2048,
}
# BYOL here is SimSiam with a momentum target: its heads, and its scale of the loss.
_BYOL = {
    "dim": 2048,
    "projector_layers": 3,
    "projector_hidden": None,
    "projector_bias": "none",
    "projector_norm": "fixed",
    "predictor_hidden": 512,
    "predictor_bias": "last",
    "ema": 0.99,
    "ema_schedule": "constant",
    "sum_directions": False,
}
_OURS = "Ours: no scale and shift in the projector's last BatchNorm (the paper does not say)."


def _rows(method: str, data: str, plain: str, guided: str, rows: dict[str, str] | None = None) -> tuple[Preset, Preset]:
    """A method without and with guidance, and the results of both; `rows`: further ones with guidance."""
    imagenet = data == "imagenet-100ep"
    values = _IMAGENET if imagenet else _CIFAR
    shared = _BYOL | values if method == "byol" else values  # CIFAR-10 has projectors of its own
    source, notes = ("GSG, code", "") if imagenet else ("GSG", _OURS)
    return (
        preset(f"{method}-unguided-{data}", "GSG, its baseline", plain, shared, guided="off", notes=notes),
        preset(f"{method}-guided-{data}", source, guided, shared, guided="guided", notes=notes, rows=rows),
    )


PRESETS = (
    *_rows(
        "simsiam",
        "imagenet-100ep",
        "kNN 51.7 %, linear 67.9 %",
        "kNN 58.4 %, linear 69.4 %",
        {"--batch-size 1024": "linear 70.1 %", "--batch-size 256": "linear 69.9 %"},
    ),
    *_rows(
        "simsiam",
        "cifar10-200ep",
        "kNN 77.0 %, linear 82.7 %",
        "kNN 82.2 %, linear 86.4 %",
        {"--guided reversed --epochs 400": "collapses, 10 %"},
    ),
    *_rows(
        "byol",
        "imagenet-100ep",
        "kNN 56.5 %, linear 69.9 %",
        "kNN 62.2 %, linear 71.1 %",
        {"--batch-size 1024": "linear 71.9 %", "--batch-size 256": "linear 71.6 %"},
    ),
    *_rows("byol", "cifar10-200ep", "kNN 85.4 %, linear 88.0 %", "kNN 89.4 %, linear 90.3 %"),
)
