"""MoCo v3: Chen, Xie and He, ICCV 2021, the code's commands for ResNet-50.

    fastssl-train mocov3-imagenet-100ep --data train.beton

Published: linear 68.9 % on ImageNet, 72.8 % after 300 epochs, 74.6 % after 1000. Cost: 256 M views, 149 hours.
"""

from typing import Any

from fastssl.config.presets.byol import LARGE_BATCH
from fastssl.config.recipe import Preset, preset

_NOTES = "Warm-up reaches the full rate at its last step; in MoCo v3's code one step later (i / W)."


def _row(name: str, result: str, **values: Any) -> Preset:
    return preset(name, "MoCo v3, code (ResNet-50)", result, LARGE_BATCH, recipe="mocov3", notes=_NOTES, **values)


PRESETS = (
    _row("mocov3-imagenet-100ep", "linear 68.9 %", lr=0.6, ema=0.99),
    _row("mocov3-imagenet-300ep", "linear 72.8 %", lr=0.3, ema=0.99),
    _row("mocov3-imagenet-1000ep", "linear 74.6 %", lr=0.3, ema=0.996, weight_decay=1.5e-6),
)
