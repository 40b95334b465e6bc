"""Imagenette, ten classes of ImageNet, for a CPU: ours, measured in benchmarks/records.

    fastssl-train fastsiam-imagenette-12ep --data train.beton --val val.beton

Measured: kNN 51.3 %, 30.8 % at random initialisation. Cost: 0.45 M views, <0.01 hours. The rows of 2 and 4 epochs are
what `python -m benchmarks.methods` runs: every method and add-on, 8 view passes per image, ten minutes on a core.
"""

from collections.abc import Mapping
from typing import Any

from fastssl.config.presets.fastsiam import FASTSIAM_LR
from fastssl.config.recipe import Preset, preset

# Small network, small views without blur, FastSiam's small batch and large rate.
_IMAGENETTE = {"size": 64, "blur": 0.0, "backbone": "resnet18", "batch_size": 32, "schedule": "step", **FASTSIAM_LR}
_SHORT = _IMAGENETTE | {"recipe": "imagenet", "knn_every": 0}
_EMA = {"ema": 0.99, "ema_schedule": "constant"}
_FASTMOCO = _EMA | {"clip_norm": 1.0}
_DINO = _EMA | {"lr": 0.06, "clip_norm": 3.0, "prototypes": 1024, "freeze_epochs": 0}
_CROPS = {"num_local": 6, "local_size": 32}


def _short(name: str, knn: str, *shared: Mapping[str, Any], **values: Any) -> Preset:
    result = f"kNN {knn} % (random initialisation: 30.8 %)"
    return preset(name, "ours, benchmarks/records", result, _SHORT, *shared, **values)


PRESETS = (
    preset(
        "fastsiam-imagenette-12ep",
        "ours, benchmarks/records",
        "kNN 51.3 % (random initialisation: 30.8 %)",
        _IMAGENETTE,
    ),
    preset("simsiam-imagenette-24ep", "ours, benchmarks/records", "kNN 50.6 %, with as many view passes", _IMAGENETTE),
    _short("simsiam-imagenette-4ep", "37.6"),
    _short("fastsiam-imagenette-2ep", "35.7"),
    _short("byol-imagenette-4ep", "34.6", _EMA, lr=0.06, projector_bias="all", predictor_bias="all"),
    # At FastSiam's rate keys collapse while the queue still holds the random rows of its start.
    _short("mocov2-imagenette-4ep", "34.8", _EMA, lr=0.015, symmetric=True, queue_size=4096, bn_splits=4),
    _short("mocov3-imagenette-4ep", "43.9", _EMA, lr=0.06, temperature=0.2),
    _short("fastmoco-imagenette-4ep", "39.5", _FASTMOCO),
    _short("nnclr-imagenette-4ep", "43.0", lr=0.06, queue_size=4096),
    _short(
        "swav-imagenette-4ep", "35.3", optimizer="adam", lr=1e-3, weight_decay=1e-6, prototypes=512, freeze_epochs=0
    ),
    _short("dino-imagenette-4ep", "35.7", _DINO),
    _short("simsiam-guided-imagenette-4ep", "31.6", guided="guided", guided_views=2),
    _short("simsiam-random-imagenette-4ep", "33.7", guided="random", guided_views=2),
    _short("simsiam-reversed-imagenette-4ep", "32.5", guided="reversed", guided_views=2),
    _short("simsiam-patches-imagenette-4ep", "38.5", patches="divide-encode-combine"),
    _short("fastmoco-off-imagenette-4ep", "35.3", _FASTMOCO, patches="off"),
    _short("dino-multicrop-imagenette-4ep", "34.6", _DINO, _CROPS),
    _short("dino-sslight-imagenette-4ep", "36.6", _DINO, _CROPS, alpha=0.4, crop_min=0.3, local_scale=(0.05, 0.3)),
)
