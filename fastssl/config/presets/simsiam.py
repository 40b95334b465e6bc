"""SimSiam: Chen and He, CVPR 2021, section 3, table 4 and the code. ResNet-50, two views.

    fastssl-train simsiam-imagenet-100ep --data train.beton

Published: linear 68.3 % on ImageNet. Cost: 256 M views, 112 hours. Longer runs, to 800 epochs: 71.3 %.
"""

from fastssl.config.recipe import preset

SIMSIAM_LR = {"lr": 0.05, "lr_batch_size": 256}
_SIMSIAM = SIMSIAM_LR | {"recipe": "imagenet", "batch_size": 256, "sync_bn": True}

PRESETS = (
    preset(
        "simsiam-imagenet-100ep",
        "SimSiam 3, code",
        "linear 68.3 %",
        _SIMSIAM,
        rows={"--batch-size 512": "linear 68.1 %"},
    ),
    *(
        preset(f"simsiam-imagenet-{epochs}ep", "SimSiam, table 4", f"linear {linear} %", _SIMSIAM)
        for epochs, linear in ((200, "70.0"), (400, "70.8"), (800, "71.3"))
    ),
)
