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
    "projector_norm": "affine",  # appendix C.2: lightly's default setup
    "zero_init_residual": False,
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


# How the paper's kNN figures were made; other protocols give others.
_KNN_IMAGENET, _KNN_CIFAR = "majority vote of 200", "nearest neighbour"
_KNN_CODE = (
    "kNN is a majority vote of 200 neighbours in the paper. The code weighs votes by exp(cosine / 0.2) and squashes "
    "images to 256 x 256."
)


def _rows(
    method: str, data: str, plain: tuple[str, str], guided: tuple[str, str], rows: dict[str, str] | None = None
) -> tuple[Preset, Preset]:
    """A method without and with guidance; `plain`, `guided`: kNN and linear top-1, in %; `rows`: more with guidance."""
    imagenet = data == "imagenet-100ep"
    values = _IMAGENET if imagenet else _CIFAR
    shared = _BYOL | values if method == "byol" else values  # CIFAR-10 has projectors of its own
    knn = _KNN_IMAGENET if imagenet else _KNN_CIFAR
    without, with_it = (f"kNN {k} % ({knn}), linear {linear} %" for k, linear in (plain, guided))
    source, notes = ("GSG, code", _KNN_CODE) if imagenet else ("GSG, appendix C.2", "")
    return (
        preset(f"{method}-unguided-{data}", "GSG, its baseline", without, shared, guided="off", notes=notes),
        preset(f"{method}-guided-{data}", source, with_it, shared, guided="guided", notes=notes, rows=rows),
    )


PRESETS = (
    *_rows(
        "simsiam",
        "imagenet-100ep",
        ("51.7", "67.9"),
        ("58.4", "69.4"),
        {"--batch-size 1024": "linear 70.1 %", "--batch-size 256": "linear 69.9 %"},
    ),
    *_rows(
        "simsiam",
        "cifar10-200ep",
        ("77.0", "82.7"),
        ("82.2", "86.4"),
        {"--guided reversed --epochs 400": "collapses, 10 %"},
    ),
    *_rows(
        "byol",
        "imagenet-100ep",
        ("56.5", "69.9"),
        ("62.2", "71.1"),
        {"--batch-size 1024": "linear 71.9 %", "--batch-size 256": "linear 71.6 %"},
    ),
    *_rows("byol", "cifar10-200ep", ("85.4", "88.0"), ("89.4", "90.3")),
)
