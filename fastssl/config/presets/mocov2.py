"""MoCo v2: Chen et al., "Improved Baselines with Momentum Contrastive Learning", 2020, tables 1-2, code. ResNet-50.

    fastssl-train mocov2-imagenet-200ep --data train.beton

Published: linear 67.5-67.7 % on ImageNet, 71.1 % after 800 epochs. Cost: 512 M views, 149 hours.
"""

from fastssl.config.recipe import preset

_MOCOV2 = {
    "recipe": "imagenet",
    "zero_init_residual": False,
    "batch_size": 256,
    "lr": 0.03,
    "lr_batch_size": 256,
    "bn_splits": 8,
}
_SPLITS = "--bn-splits stands for the paper's 8 GPUs, on which the keys are shuffled: with N processes use 8/N."

PRESETS = (
    preset("mocov2-imagenet-200ep", "MoCo v2, table 1, code", "linear 67.5-67.7 %", _MOCOV2, notes=_SPLITS),
    preset("mocov2-imagenet-800ep", "MoCo v2, table 2", "linear 71.1 %", _MOCOV2, notes=_SPLITS),
)
