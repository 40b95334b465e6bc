"""BYOL: Grill et al., NeurIPS 2020, section 3.3 and table 1. ResNet-50.

    fastssl-train byol-imagenet-1000ep --data train.beton

Published: linear 74.3 % on ImageNet. Cost: 2,562 M views, 1,486 hours. After 100 epochs: 66.5 % (SimSiam, table 4).
"""

from fastssl.config.recipe import preset

# The LARS recipe of large batches; MoCo v3 and NNCLR have it, too. Each takes its rate and momentum.
LARGE_BATCH = {
    "optimizer": "lars",
    "batch_size": 4096,
    "lr_batch_size": 256,
    "weight_decay": 1e-6,
    "no_decay": "1d",
    "schedule": "step",
    "warmup_epochs": 10.0,
    "sync_bn": True,
}
_BYOL = LARGE_BATCH | {"recipe": "byol"}
_OURS = "Ours: residual branches start at zero and BatchNorm is synchronised."

PRESETS = (
    preset(
        "byol-imagenet-100ep",
        "BYOL 3.3; rate: lightly",
        "linear 66.5 % (SimSiam, table 4)",
        _BYOL,
        lr=0.45,
        ema=0.99,
        notes=_OURS,
    ),
    preset(
        "byol-imagenet-1000ep",
        "BYOL 3.3, table 1",
        "linear 74.3 %",
        _BYOL,
        lr=0.2,
        ema=0.996,
        weight_decay=1.5e-6,
        notes=_OURS,
    ),
)
