"""DINO: Caron et al., ICCV 2021, the code's command for ResNet-50. Its ViTs are in sslight.py, with SSLight's results.

    fastssl-train dino-imagenet-100ep --data train.beton

Published: nothing after 100 epochs. Cost: 1,281 M views, 234 hours.
"""

from fastssl.config.presets.swav import CNN_CROPS
from fastssl.config.recipe import preset

PRESETS = (
    preset(
        "dino-imagenet-100ep",
        "DINO, code (ResNet-50)",
        "none published",
        CNN_CROPS,
        recipe="byol",
        num_local=8,
        zero_init_residual=False,
        batch_size=512,
        lr=0.03,
        lr_batch_size=256,
        min_lr=1e-6,
        weight_decay=1e-4,
        no_decay="1d",
        schedule="step",
        warmup_epochs=10.0,
        clip_each_norm=3.0,
        projector_bn=False,
        sync_bn=True,
        notes="Rate, warm-up, clipping and what decays are lightly's. Ours, after the code's defaults: 64 images per "
        "GPU, 8 small crops, the last rate, BatchNorm synchronised, residual branches not started at zero.",
    ),
)
