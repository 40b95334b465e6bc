"""NNCLR: Dwibedi et al., ICCV 2021, section 4.1. ResNet-50.

    fastssl-train nnclr-imagenet-100ep --data train.beton

Published: linear 69.4 % on ImageNet. Cost: 256 M views, 112 hours.
"""

from fastssl.config.presets.byol import LARGE_BATCH
from fastssl.config.recipe import preset

PRESETS = (
    preset(
        "nnclr-imagenet-100ep",
        "NNCLR 4.1",
        "linear 69.4 %",
        LARGE_BATCH,
        recipe="byol",
        lr=0.3,
        notes="Ours: BYOL's augmentation, no decay of biases and norms, residual branches start at zero, BatchNorm is "
        "synchronised.",
    ),
)
