"""CIFAR-10 with a ResNet-18 for small images: lightly's benchmark, and SimSiam's appendix D.

    fastssl-train fastsiam-cifar10-200ep --data train.beton --val val.beton

Published by lightly: kNN 90.6 %. Cost: 40.0 M views, 2.39 hours.
"""

from fastssl.config.recipe import preset

# Heads of SimSiam's appendix D (2 layers of 2048), its weight decay, its network.
_CIFAR = {"size": 32, "recipe": "cifar", "backbone": "resnet18-cifar", "weight_decay": 5e-4}
_HEADS = {"projector_layers": 2, "projector_hidden": 2048}
_LIGHTLY = _CIFAR | {"batch_size": 128, "lr": 0.06, "lr_batch_size": 128, "zero_init_residual": False}
_BYOL = {
    "recipe": "cifar-byol",
    "projector_hidden": 1024,
    "predictor_hidden": 1024,
    "ema": 0.99,
    "ema_schedule": "constant",
    "sum_directions": False,
}
_BENCHMARK = "lightly's benchmark"
_NEARLY = "Ours: crops and colours as nearly as the recipes here have them."
_OURS = "All of it is ours: lightly's settings for the other methods, T 0.2."

PRESETS = (
    preset(
        "simsiam-cifar10-800ep",
        "SimSiam, appendix D",
        "kNN 90.4 % (lightly, rate 0.06)",
        _CIFAR,
        _HEADS,
        batch_size=512,
        lr=0.03,
        lr_batch_size=256,
    ),
    preset(
        "fastsiam-cifar10-200ep",
        _BENCHMARK,
        "kNN 90.6 %",
        _CIFAR,
        _HEADS,
        batch_size=128,
        lr=0.06,
        lr_batch_size=128,
        notes="Heads are SimSiam's. lightly's: --projector-norm affine --no-fix-pred-lr --no-zero-init-residual.",
    ),
    preset(
        "simsiam-cifar10-200ep",
        _BENCHMARK,
        "kNN 81.9 %",
        _LIGHTLY,
        _HEADS,
        lr_batch_size=0,  # lightly does not scale it
        crop_min=0.2,
        projector_norm="affine",
        fix_pred_lr=False,
        rows={"--batch-size 512": "kNN 76.4 %", "--batch-size 512 --epochs 800": "kNN 90.4 %"},
        notes=_NEARLY,
    ),
    preset("byol-cifar10-200ep", _BENCHMARK, "kNN 86.9 %", _LIGHTLY, _BYOL, notes=_NEARLY),
    preset(
        "mocov2-cifar10-200ep",
        _BENCHMARK,
        "kNN 83.8 %",
        _LIGHTLY,
        crop_min=0.2,
        queue_size=4096,
        temperature=0.1,
        ema=0.99,
        symmetric=True,
        bn_splits=8,
        notes=_NEARLY,
    ),
    preset(
        "nnclr-cifar10-200ep",
        _BENCHMARK,
        "kNN 83.4 %",
        _LIGHTLY,
        projector_layers=2,
        queue_size=4096,
        temperature=0.2,
        notes=_NEARLY + " So is T 0.2 (solo-learn's): lightly's loss is another, SimCLR's with neighbours at T 0.5.",
    ),
    preset(
        "swav-cifar10-200ep",
        _BENCHMARK,
        "kNN 81.2 %",
        _LIGHTLY,
        crop_min=0.14,
        optimizer="adam",
        lr=1e-3,
        weight_decay=1e-6,
        projector_hidden=512,
        prototypes=512,
        freeze_epochs=0,
        notes=_NEARLY,
    ),
    preset(
        "dino-cifar10-200ep",
        _BENCHMARK,
        "kNN 84.0 %",
        _LIGHTLY,
        recipe="cifar-byol",
        crop_min=0.4,
        projector_layers=2,
        prototypes=2048,
        ema=0.99,
        ema_schedule="constant",
        freeze_epochs=0,
        notes=_NEARLY,
    ),
    preset("mocov3-cifar10-200ep", "ours", "none published", _LIGHTLY, _BYOL, temperature=0.2, notes=_OURS),
    preset(
        "fastmoco-cifar10-200ep",
        "ours",
        "none published",
        _LIGHTLY,
        crop_min=0.2,
        temperature=0.2,
        clip_norm=1.0,
        notes=_OURS + " Heads and clipping are Fast-MoCo's; tiles have 16 px.",
    ),
)
