"""Combinatorial patches on other methods: Fast-MoCo (Ci et al., ECCV 2022), section 4.4. ResNet-50.

    fastssl-train byol-patches-imagenet-100ep --data train.beton

Published: linear 73.6 % on ImageNet with BYOL, 72.5 % with NNCLR, 71.7 % with SimSiam. Cost: 256 M views, 157 hours.
"""

from fastssl.config.presets.fastmoco import FASTMOCO
from fastssl.config.recipe import preset

_PATCHES = FASTMOCO | {"patches": "divide-encode-combine"}
_FASTMOCO_HEADS = {
    "dim": 2048,
    "projector_layers": 3,
    "projector_hidden": 2048,
    "projector_bias": "all",
    "projector_norm": "affine",
    "predictor_hidden": 512,
    "predictor_bias": "all",
    "fix_pred_lr": True,
}

PRESETS = (
    preset(
        "simsiam-patches-imagenet-100ep",
        "Fast-MoCo 4.4",
        "linear 71.7 %",
        _PATCHES,
        notes="SimSiam's heads; ours: optimisation is Fast-MoCo's.",
    ),
    preset(
        "byol-patches-imagenet-100ep",
        "Fast-MoCo 4.4",
        "linear 73.6 %",
        _PATCHES,
        _FASTMOCO_HEADS,
        ema=0.99,
        ema_schedule="constant",
        sum_directions=False,
        notes="Ours: heads, optimisation and the mean over all terms are Fast-MoCo's; the paper does not give them.",
    ),
    preset(
        "nnclr-patches-imagenet-100ep",
        "Fast-MoCo 4.4",
        "linear 72.5 %",
        _PATCHES,
        _FASTMOCO_HEADS,
        notes="Ours: heads and optimisation are Fast-MoCo's; the paper does not give them. The queue takes 0.8 GB.",
    ),
)
