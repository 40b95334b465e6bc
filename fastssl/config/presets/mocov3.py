"""MoCo v3: Chen, Xie and He, ICCV 2021, the code's commands for ResNet-50.

    fastssl-train mocov3-imagenet-100ep --data train.beton

Published: linear 68.9 % on ImageNet, 72.8 % after 300 epochs, 74.6 % after 1000. Cost: 256 M views, 149 hours.
"""

from fastssl.config.presets.byol import LARGE_BATCH
from fastssl.config.recipe import preset

_MOCOV3 = LARGE_BATCH | {"recipe": "mocov3"}
_SOURCE = "MoCo v3, code (ResNet-50)"

PRESETS = (
    preset("mocov3-imagenet-100ep", _SOURCE, "linear 68.9 %", _MOCOV3, lr=0.6, ema=0.99),
    preset("mocov3-imagenet-300ep", _SOURCE, "linear 72.8 %", _MOCOV3, lr=0.3, ema=0.99),
    preset("mocov3-imagenet-1000ep", _SOURCE, "linear 74.6 %", _MOCOV3, lr=0.3, ema=0.996, weight_decay=1.5e-6),
)
