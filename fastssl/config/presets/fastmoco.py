"""Fast-MoCo: Ci et al., ECCV 2022, section 3.2, the tables of its ablations and the code. ResNet-50.

    fastssl-train fastmoco-imagenet-100ep --data train.beton

Published: linear 73.5 % on ImageNet, 70.3 % without patches. Cost: 256 M views, 157 hours. The rows of the ablations
are options (`fastssl-train --list fastmoco-imagenet-100ep`).
"""

from fastssl.config.recipe import preset

# Optimisation; the heads are the method's defaults.
FASTMOCO = {
    "recipe": "fastmoco",
    "batch_size": 512,
    "lr": 0.1,
    "lr_batch_size": 512,
    "schedule": "step",
    "warmup_epochs": 1.0,
    "warmup_start": 0.25,
    "clip_norm": 1.0,
    "sync_bn": True,
}

PRESETS = (
    preset(
        "fastmoco-imagenet-100ep",
        "Fast-MoCo 3.2, code",
        "linear 73.5 %",
        FASTMOCO,
        rows={
            "--patches off": "linear 70.3 % (its MoCo v3)",
            "--patches encode": "linear 68.9 %",
            "--patches sample-combine-encode": "linear 71.2 %",
            "--patches divide-combine-encode": "linear 71.8 %",
            "--patches montage": "linear 70.4 %",
            "--patches sample-encode-combine": "linear 72.9 %",
            "--pairs 2": "linear 72.6 %",
            "--pairs 4": "linear 73.3 %",
            "--target-view same": "linear 48.5 %",
            "--combine-by max": "linear 64.6 %",
            "--combine-by weighted --combine-weight 0.3": "below equal weights",
            "--combine-by beta --combine-weight 1.0": "below equal weights",
            "--combine-after projector": "clearly worse",
            "--combine-after predictor": "clearly worse",
            "--patches off --extra-crops 1": "linear 73.1 %",
            "--extra-crops 1": "linear 74.2 %",
            "--batch-size 1024": "linear 73.6 %",
            "--batch-size 256": "linear 72.5 %",
        },
        notes="Ablations of 20 epochs have 1.5 times the rate: --epochs 20 --lr 0.15. In the code targets start from "
        "weights of their own, the heads' BatchNorms from scales in (0, 1): --target-init independent --norm-init "
        "uniform. After warm-up its cosine is one step ahead of the one here.",
    ),
    preset("fastmoco-imagenet-200ep", "Fast-MoCo 3.2, code", "linear 75.1 %", FASTMOCO),
    preset("fastmoco-imagenet-400ep", "Fast-MoCo 3.2, code", "linear 75.5 %", FASTMOCO),
)
