"""FastSiam: Pototzky et al., GCPR 2022, section 4.1 and tables 1-4. ResNet-50, four views, one card.

    fastssl-train fastsiam-imagenet-25ep --data train.beton

Published: COCO box AP 39.7 with a Mask R-CNN FPN, as with labels. Cost: 128 M views, 55.8 hours.
"""

from fastssl.config.recipe import preset

# FastSiam's rate is given at 32 images, SimSiam's at 256: each quotes its paper.
FASTSIAM_LR = {"lr": 0.125, "lr_batch_size": 32}
_FASTSIAM = FASTSIAM_LR | {"recipe": "imagenet", "batch_size": 32, "num_views": 4}

PRESETS = (
    preset(
        "fastsiam-imagenet-25ep",
        "FastSiam 4.1, tables 1-4",
        "COCO box AP 39.7 (with labels: 39.7)",
        _FASTSIAM,
        rows={"--batch-size 64": "COCO box AP 39.7", "--batch-size 128": "COCO box AP 39.8"},
        notes="The paper does not say whether the predictor's rate stays fixed: it does, as in SimSiam.",
    ),
    preset(
        "fastsiam-imagenet-10ep", "FastSiam 4.1, tables 1-4", "COCO box AP 38.9 (SimSiam, 100 epochs: 38.4)", _FASTSIAM
    ),
)
