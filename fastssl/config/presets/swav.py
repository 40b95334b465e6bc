"""SwAV: Caron et al., NeurIPS 2020, section 4, appendix A and the commands of the code. ResNet-50, 2 + 6 crops.

    fastssl-train swav-bs256-imagenet-200ep --data train.beton

Published: linear 72.7 % on ImageNet with batches of 256, 73.9 % with 4096. Cost: 2,050 M views, 346 hours.
"""

from fastssl.config.recipe import preset

# The usual crops of convolutional networks. alpha None: all pairs alike, 1/(1+L).
CNN_CROPS = {"crop_min": 0.14, "local_scale": (0.05, 0.14), "local_size": 96, "num_local": 6, "alpha": None}
_SWAV = CNN_CROPS | {
    "recipe": "swav",
    "interpolation": "bilinear",
    "zero_init_residual": False,
    "optimizer": "lars",
    "weight_decay": 1e-6,
    "no_decay": "none",
    "schedule": "step",
    "sync_bn": True,
}
# With a small batch beside 3000 prototypes codes need the queue: the recipe that one card can follow comes first.
_BATCH_256 = {"batch_size": 256, "lr": 0.6, "lr_batch_size": 256, "min_lr": 0.0006, "queue_size": 3840}
_BATCH_4096 = {
    "batch_size": 4096,
    "lr": 4.8,
    "lr_batch_size": 4096,
    "min_lr": 0.0048,
    "warmup_epochs": 10.0,
    "warmup_start": 0.0625,
}
_OURS = (
    "Prototypes are frozen for an epoch, in the code for 313 steps of 4096 images or 5005 of 256: one more. Ours: "
    "synchronised BatchNorm."
)

PRESETS = tuple(
    preset(f"swav-{variant}imagenet-{epochs}ep", "SwAV, code", f"linear {linear} %", _SWAV, batch, notes=_OURS)
    for variant, batch, epochs, linear in (
        ("bs256-", _BATCH_256, 200, "72.7"),
        ("bs256-", _BATCH_256, 400, "74.3"),
        ("", _BATCH_4096, 100, "72.1"),
        ("", _BATCH_4096, 200, "73.9"),
        ("", _BATCH_4096, 400, "74.6"),
        ("", _BATCH_4096, 800, "75.3"),
    )
)
