"""Named recipes, METHOD[-VARIANT]-DATASET-EPOCHS: `fastssl-train NAME --data TRAIN.beton`.

A recipe is the leaf fields of the configuration in which it differs from the defaults (config/schema.py and the file
of its method), its source and the result published there; `fastssl-train --list` shows them. What recipes share stands
once.

The first recipe of a method is what `--method METHOD` alone begins with. Values that no source gives are called "ours"
in notes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastssl.config import schema as configs
from fastssl.config.schema import Config, Model
from loaders.errors import unknown

# Training images.
DATASETS = {"imagenet": 1_281_167, "imagenette": 9_469, "cifar10": 50_000}
# What `--method M` alone takes per step, so that it runs on one card: FastSiam's batch.
_SMALL_BATCH = 32


@dataclass(frozen=True)
class Preset:
    """One recipe."""

    name: str
    method: str
    values: Mapping[str, Any]
    """Leaf fields of the configuration."""
    source: str
    """Paper and section, or whose it is."""
    result: str
    """What the source reports: top-1 on ImageNet or CIFAR-10 unless it says otherwise."""
    num_images: int
    """Images of the training set."""
    rows: Mapping[str, str] = field(default_factory=dict)
    """Other rows of the source's tables: options that make them, and their results."""
    notes: str = ""
    """What is ours, and what differs from the source."""

    def make(self) -> Config:
        """The configuration."""
        config = configs.typed_config(self.method)(model=Model(method=self.method), preset=self.name)
        return configs.replace(config, **self.values)


PRESETS: dict[str, Preset] = {}


def load(name: str) -> Config:
    """The configuration of preset `name`. Raises UserError for an unknown one."""
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS, listing="fastssl-train --list")
    return PRESETS[name].make()


def first_of(method: str) -> Config:
    """What `--method METHOD` alone begins with: the method's first preset at 32 images per step, to which its rate is
    scaled; the method's defaults if it has none. Raises UserError for an unknown method."""
    for preset in PRESETS.values():
        if preset.method == method:
            config = configs.replace(preset.make(), batch_size=_SMALL_BATCH)
            config.preset = ""
            return config
    return configs.typed_config(method)(model=Model(method=method))


def _add(
    name: str,
    *shared: Mapping[str, Any],
    source: str,
    result: str = "none published",
    rows: Mapping[str, str] | None = None,
    notes: str = "",
    **values: Any,
) -> None:
    """Enter a preset. Method, data set and epochs are in its name; its fields are those of `shared` and `values`, of
    which later ones win."""
    method, *_, dataset, epochs = name.split("-")
    merged: dict[str, Any] = {"epochs": int(epochs.removesuffix("ep"))}
    for part in (*shared, values):
        merged |= part
    PRESETS[name] = Preset(name, method, merged, source, result, DATASETS[dataset], rows or {}, notes)


# ------------------------------------------------------------------ FastSiam, SimSiam

# FastSiam's rate is given at 32 images, SimSiam's at 256: each quotes its paper.
_FASTSIAM_LR = {"lr": 0.125, "lr_batch_size": 32}
_SIMSIAM_LR = {"lr": 0.05, "lr_batch_size": 256}

_FASTSIAM = _FASTSIAM_LR | {"recipe": "imagenet", "batch_size": 32, "num_views": 4}
_add(
    "fastsiam-imagenet-25ep",
    _FASTSIAM,
    source="FastSiam 4.1, tables 1-4",
    result="COCO box AP 39.7 (with labels: 39.7)",
    rows={"--batch-size 64": "COCO box AP 39.7", "--batch-size 128": "COCO box AP 39.8"},
    notes="The paper does not say whether the predictor's rate stays fixed: it does, as in SimSiam.",
)
_add(
    "fastsiam-imagenet-10ep",
    _FASTSIAM,
    source="FastSiam 4.1, tables 1-4",
    result="COCO box AP 38.9 (SimSiam, 100 epochs: 38.4)",
)

_SIMSIAM = _SIMSIAM_LR | {"recipe": "imagenet", "batch_size": 256, "sync_bn": True}
_add(
    "simsiam-imagenet-100ep",
    _SIMSIAM,
    source="SimSiam 3, code",
    result="linear 68.3 %",
    rows={"--batch-size 512": "linear 68.1 %"},
)
for _epochs, _linear in ((200, "70.0"), (400, "70.8"), (800, "71.3")):
    _add(f"simsiam-imagenet-{_epochs}ep", _SIMSIAM, source="SimSiam, table 4", result=f"linear {_linear} %")

# ------------------------------------------------------------------ Fast-MoCo

_FASTMOCO = {
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
_add(
    "fastmoco-imagenet-100ep",
    _FASTMOCO,
    source="Fast-MoCo 3.2, code",
    result="linear 73.5 %",
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
    "weights of their own, the heads' BatchNorms from scales in (0, 1): --target-init independent --norm-init uniform.",
)
_add("fastmoco-imagenet-200ep", _FASTMOCO, source="Fast-MoCo 3.2, code", result="linear 75.1 %")
_add("fastmoco-imagenet-400ep", _FASTMOCO, source="Fast-MoCo 3.2, code", result="linear 75.5 %")

_FASTMOCO_HEADS = {
    "dim": 2048,
    "projector_layers": 3,
    "projector_hidden": 2048,
    "projector_bias": True,
    "projector_norm": "affine",
    "predictor_hidden": 512,
    "predictor_bias": "all",
    "fix_pred_lr": True,
}
_PATCHES = _FASTMOCO | {"patches": "divide-encode-combine"}
_add(
    "simsiam-patches-imagenet-100ep",
    _PATCHES,
    source="Fast-MoCo 4.4",
    result="linear 71.7 %",
    notes="SimSiam's heads; ours: optimisation is Fast-MoCo's.",
)

# ------------------------------------------------------------------ MoCo v2, MoCo v3, BYOL, NNCLR

_MOCOV2 = {
    "recipe": "imagenet",
    "zero_init_residual": False,
    "batch_size": 256,
    "lr": 0.03,
    "lr_batch_size": 256,
    "bn_splits": 8,
}
_SPLITS = "--bn-splits stands for the paper's 8 GPUs, on which the keys are shuffled: with N processes use 8/N."
_add(
    "mocov2-imagenet-200ep",
    _MOCOV2,
    source="MoCo v2, table 1, code",
    result="linear 67.5-67.7 %",
    notes=_SPLITS,
)
_add("mocov2-imagenet-800ep", _MOCOV2, source="MoCo v2, table 2", result="linear 71.1 %", notes=_SPLITS)

# The LARS recipe of large batches; each takes its rate and momentum.
_LARGE_BATCH = {
    "optimizer": "lars",
    "batch_size": 4096,
    "lr_batch_size": 256,
    "weight_decay": 1e-6,
    "no_decay": "1d",
    "schedule": "step",
    "warmup_epochs": 10.0,
    "sync_bn": True,
}
_MOCOV3 = _LARGE_BATCH | {"recipe": "mocov3"}
_add("mocov3-imagenet-100ep", _MOCOV3, lr=0.6, ema=0.99, source="MoCo v3, code (ResNet-50)", result="linear 68.9 %")
_add("mocov3-imagenet-300ep", _MOCOV3, lr=0.3, ema=0.99, source="MoCo v3, code (ResNet-50)", result="linear 72.8 %")
_add(
    "mocov3-imagenet-1000ep",
    _MOCOV3,
    lr=0.3,
    ema=0.996,
    weight_decay=1.5e-6,
    source="MoCo v3, code (ResNet-50)",
    result="linear 74.6 %",
)

_BYOL = _LARGE_BATCH | {"recipe": "byol"}
_BYOL_OURS = "Ours: residual branches start at zero and BatchNorm is synchronised."
_add(
    "byol-imagenet-100ep",
    _BYOL,
    lr=0.45,
    ema=0.99,
    source="BYOL 3.3; rate: lightly",
    result="linear 66.5 % (SimSiam, table 4)",
    notes=_BYOL_OURS,
)
_add(
    "byol-imagenet-1000ep",
    _BYOL,
    lr=0.2,
    ema=0.996,
    weight_decay=1.5e-6,
    source="BYOL 3.3, table 1",
    result="linear 74.3 %",
    notes=_BYOL_OURS,
)
_add(
    "byol-patches-imagenet-100ep",
    _PATCHES,
    _FASTMOCO_HEADS,
    ema=0.99,
    ema_schedule="constant",
    sum_directions=False,
    source="Fast-MoCo 4.4",
    result="linear 73.6 %",
    notes="Ours: heads, optimisation and the mean over all terms are Fast-MoCo's; the paper does not give them.",
)

_add(
    "nnclr-imagenet-100ep",
    _LARGE_BATCH,
    recipe="byol",
    lr=0.3,
    source="NNCLR 4.1",
    result="linear 69.4 %",
    notes="Ours: BYOL's augmentation, no decay of biases and norms, residual branches start at zero, BatchNorm is "
    "synchronised.",
)
_add(
    "nnclr-patches-imagenet-100ep",
    _PATCHES,
    _FASTMOCO_HEADS,
    source="Fast-MoCo 4.4",
    result="linear 72.5 %",
    notes="Ours: heads and optimisation are Fast-MoCo's; the paper does not give them. The queue takes 0.8 GB.",
)

# ------------------------------------------------------------------ guided stop-gradient

_GSG = _SIMSIAM_LR | {"recipe": "imagenet", "batch_size": 512, "fix_pred_lr": True, "sync_bn": True}
_GSG_CIFAR = {
    "recipe": "cifar",
    "size": 32,
    "backbone": "resnet18-cifar",
    "batch_size": 512,
    "lr": 0.06,
    "lr_batch_size": 512,
    "weight_decay": 5e-4,
    "schedule": "constant",
    "projector_layers": 2,
    "projector_hidden": 2048,
}
# BYOL here is SimSiam with a momentum target: its heads, and its scale of the loss.
_GSG_BYOL = {
    "dim": 2048,
    "projector_layers": 3,
    "projector_hidden": None,
    "projector_bias": False,
    "projector_norm": "fixed",
    "predictor_hidden": 512,
    "predictor_bias": "last",
    "ema": 0.99,
    "ema_schedule": "constant",
    "sum_directions": False,
}
_GSG_ROWS = {
    "simsiam": {"--batch-size 1024": "linear 70.1 %", "--batch-size 256": "linear 69.9 %"},
    "byol": {"--batch-size 1024": "linear 71.9 %", "--batch-size 256": "linear 71.6 %"},
}
_GSG_RESULTS = {  # kNN and linear: ImageNet without, with; CIFAR-10 without, with
    "simsiam": (("51.7", "67.9"), ("58.4", "69.4"), ("77.0", "82.7"), ("82.2", "86.4")),
    "byol": (("56.5", "69.9"), ("62.2", "71.1"), ("85.4", "88.0"), ("89.4", "90.3")),
}
for _method, _heads in (("simsiam", {}), ("byol", _GSG_BYOL)):
    for _i, _guided in enumerate(("off", "guided")):
        _name = f"{_method}-{'guided' if _guided == 'guided' else 'unguided'}"
        _add(
            f"{_name}-imagenet-100ep",
            _heads,
            _GSG,
            guided=_guided,
            source="GSG, code" if _guided == "guided" else "GSG, its baseline",
            result="kNN {} %, linear {} %".format(*_GSG_RESULTS[_method][_i]),
            rows=_GSG_ROWS[_method] if _guided == "guided" else None,
        )
        _add(
            f"{_name}-cifar10-200ep",
            _heads,
            _GSG_CIFAR,
            guided=_guided,
            source="GSG" if _guided == "guided" else "GSG, its baseline",
            result="kNN {} %, linear {} %".format(*_GSG_RESULTS[_method][_i + 2]),
            rows={"--guided reversed --epochs 400": "collapses, 10 %"} if _name == "simsiam-guided" else None,
            notes="Ours: no scale and shift in the projector's last BatchNorm (the paper does not say).",
        )

# ------------------------------------------------------------------ SwAV, DINO

# Recipes of crops: convolutional networks' and ViTs' usual ones, and SSLight's. alpha None: all pairs alike, 1/(1+L).
_CNN_CROPS = {"crop_min": 0.14, "local_scale": (0.05, 0.14), "local_size": 96, "num_local": 6, "alpha": None}
_VIT_CROPS = {"crop_min": 0.25, "local_scale": (0.05, 0.25), "local_size": 96, "num_local": 10, "alpha": None}
_SSLIGHT_CROPS = {"crop_min": 0.3, "local_scale": (0.05, 0.3), "local_size": 128, "alpha": 0.4}

_SWAV = _CNN_CROPS | {
    "recipe": "swav",
    "zero_init_residual": False,
    "optimizer": "lars",
    "weight_decay": 1e-6,
    "no_decay": "none",
    "schedule": "step",
    "sync_bn": True,
}
# With a small batch beside 3000 prototypes codes need the queue: the recipe that one card can follow comes first.
_SWAV_256 = {"batch_size": 256, "lr": 0.6, "lr_batch_size": 256, "min_lr": 0.0006, "queue_size": 3840}
_SWAV_4096 = {
    "batch_size": 4096,
    "lr": 4.8,
    "lr_batch_size": 4096,
    "min_lr": 0.0048,
    "warmup_epochs": 10.0,
    "warmup_start": 0.0625,
}
_SWAV_OURS = "Crops are cut bicubic, in SwAV's code bilinear. Ours: synchronised BatchNorm."
for _epochs, _linear in ((200, "72.7"), (400, "74.3")):
    _add(
        f"swav-bs256-imagenet-{_epochs}ep",
        _SWAV,
        _SWAV_256,
        source="SwAV, code",
        result=f"linear {_linear} %",
        notes=_SWAV_OURS,
    )
for _epochs, _linear in ((100, "72.1"), (200, "73.9"), (400, "74.6"), (800, "75.3")):
    _add(
        f"swav-imagenet-{_epochs}ep",
        _SWAV,
        _SWAV_4096,
        source="SwAV, code",
        result=f"linear {_linear} %",
        notes=_SWAV_OURS,
    )

_add(
    "dino-imagenet-100ep",
    _CNN_CROPS,
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
    clip_norm=3.0,
    sync_bn=True,
    source="DINO, code (ResNet-50)",
    notes="Rate, warm-up, clipping and what decays are lightly's. Ours, after the code's defaults: 64 images per GPU, "
    "8 small crops, the last rate, BatchNorm synchronised, residual branches not started at zero.",
)

# ------------------------------------------------------------------ SSLight: small networks, re-balanced crops

_SSLIGHT_CNN = {
    "zero_init_residual": False,
    "batch_size": 1024,
    "optimizer": "lars",
    "lr": 0.48,
    "lr_batch_size": 256,
    "min_lr": 0.0048,
    "weight_decay": 1e-6,
    "no_decay": "1d+depthwise",
    "schedule": "step",
    "warmup_epochs": 10.0,
    "sync_bn": True,
}
_SSLIGHT_DINO_CNN = _SSLIGHT_CNN | {
    "recipe": "byol",
    "prototypes": 4096,
    "teacher_temperature": 0.07,
    "teacher_warmup_epochs": 50,
}
_SSLIGHT_DINO_VIT = {
    "recipe": "byol",
    "batch_size": 1024,
    "drop_path": 0.1,
    "optimizer": "adamw",
    "lr": 5e-4,
    "lr_batch_size": 256,
    "min_lr": 1e-5,
    "weight_decay": 0.04,
    "weight_decay_end": 0.4,
    "no_decay": "1d",
    "schedule": "step",
    "warmup_epochs": 10.0,
    "prototypes": 65536,
    "projector_bn": False,
    "train_last_norm": True,
    "teacher_temperature": 0.07,
    "teacher_warmup_epochs": 30,
}
_SSLIGHT_MOCO = _SSLIGHT_CNN | {"recipe": "byol", "projector_hidden": 2048, "projector_init": "vit"}
_SSLIGHT_SWAV = _SSLIGHT_CNN | {
    "recipe": "swav",
    "lr": 0.3,
    "warmup_start": 0.0625,
    "projector_hidden": 4096,
    "queue_size": 3072,
}
_SSLIGHT = (  # method, network in the name, --backbone, recipe, usual crops, linear top-1 without and with
    ("dino", "r18", "resnet18", _SSLIGHT_DINO_CNN, _CNN_CROPS, ("62.2", "65.7")),
    ("dino", "r34", "resnet34", _SSLIGHT_DINO_CNN, _CNN_CROPS, ("67.7", "69.7")),
    ("dino", "r50", "resnet50", _SSLIGHT_DINO_CNN, _CNN_CROPS, ("73.4", "73.4")),
    ("dino", "mnv2", "mobilenet_v2", _SSLIGHT_DINO_CNN, _CNN_CROPS, ("66.2", "68.3")),
    ("mocov2", "mnv2", "mobilenet_v2", _SSLIGHT_MOCO, _CNN_CROPS, ("60.6", "61.6")),
    ("swav", "mnv2", "mobilenet_v2", _SSLIGHT_SWAV, _CNN_CROPS, ("65.2", "67.3")),
    ("dino", "vit-t32", "vit-t32", _SSLIGHT_DINO_VIT, _VIT_CROPS, ("55.4", "60.1")),
    ("dino", "vit-t16", "vit-t16", _SSLIGHT_DINO_VIT, _VIT_CROPS, ("66.7", "69.5")),
    ("dino", "vit-s16", "vit-s16", _SSLIGHT_DINO_VIT, _VIT_CROPS, ("75.4", "76.1")),
)
_UNCONFIGURED = dict.fromkeys(
    ("r50", "vit-t32", "vit-s16"), "The code has no configuration for this network: ours is that of its like. "
)
for _method, _short, _backbone, _recipe, _crops, _linear in _SSLIGHT:
    _ours = _UNCONFIGURED.get(_short, "")
    _add(
        f"{_method}-multicrop-{_short}-imagenet-200ep",
        _recipe,
        _crops,
        backbone=_backbone,
        source="SSLight, its baseline",
        result=f"linear {_linear[0]} %",
        notes=_ours + "Re-balanced weights alone: --alpha 0.4.",
    )
    _add(
        f"{_method}-sslight-{_short}-imagenet-200ep",
        _recipe,
        _crops | _SSLIGHT_CROPS,
        backbone=_backbone,
        source="SSLight, code",
        result=f"linear {_linear[1]} %",
        notes=_ours + "Beside the weights of pairs the crops' scales change, and the small ones' side: 128 px for 96.",
    )

# ------------------------------------------------------------------ CIFAR-10

# Heads of SimSiam's appendix D (2 layers of 2048), its weight decay, its network.
_CIFAR = {"size": 32, "recipe": "cifar", "backbone": "resnet18-cifar", "weight_decay": 5e-4}
_CIFAR_HEADS = {"projector_layers": 2, "projector_hidden": 2048}
_add(
    "simsiam-cifar10-800ep",
    _CIFAR,
    _CIFAR_HEADS,
    batch_size=512,
    lr=0.03,
    lr_batch_size=256,
    source="SimSiam, appendix D",
    result="kNN 90.4 % (lightly, rate 0.06)",
)
_add(
    "fastsiam-cifar10-200ep",
    _CIFAR,
    _CIFAR_HEADS,
    batch_size=128,
    lr=0.06,
    lr_batch_size=128,
    source="lightly's benchmark",
    result="kNN 90.6 %",
    notes="Heads are SimSiam's. lightly's: --projector-norm affine --no-fix-pred-lr --no-zero-init-residual.",
)

_LIGHTLY = _CIFAR | {"batch_size": 128, "lr": 0.06, "lr_batch_size": 128, "zero_init_residual": False}
_LIGHTLY_OURS = "Ours: crops and colours as nearly as the recipes here have them."
_add(
    "simsiam-cifar10-200ep",
    _LIGHTLY,
    _CIFAR_HEADS,
    lr_batch_size=0,  # lightly does not scale it
    crop_min=0.2,
    projector_norm="affine",
    fix_pred_lr=False,
    source="lightly's benchmark",
    result="kNN 81.9 %",
    rows={"--batch-size 512": "kNN 76.4 %", "--batch-size 512 --epochs 800": "kNN 90.4 %"},
    notes=_LIGHTLY_OURS,
)
_LIGHTLY_BYOL = {
    "recipe": "cifar-byol",
    "projector_hidden": 1024,
    "predictor_hidden": 1024,
    "ema": 0.99,
    "ema_schedule": "constant",
    "sum_directions": False,
}
_add(
    "byol-cifar10-200ep",
    _LIGHTLY,
    _LIGHTLY_BYOL,
    source="lightly's benchmark",
    result="kNN 86.9 %",
    notes=_LIGHTLY_OURS,
)
_add(
    "mocov2-cifar10-200ep",
    _LIGHTLY,
    crop_min=0.2,
    queue_size=4096,
    temperature=0.1,
    ema=0.99,
    symmetric=True,
    bn_splits=8,
    source="lightly's benchmark",
    result="kNN 83.8 %",
    notes=_LIGHTLY_OURS,
)
_add(
    "nnclr-cifar10-200ep",
    _LIGHTLY,
    projector_layers=2,
    queue_size=4096,
    temperature=0.2,
    source="lightly's benchmark",
    result="kNN 83.4 %",
    notes=_LIGHTLY_OURS + " So is T 0.2 (solo-learn's): lightly's loss is another, SimCLR's with neighbours at T 0.5.",
)
_add(
    "swav-cifar10-200ep",
    _LIGHTLY,
    crop_min=0.14,
    optimizer="adam",
    lr=1e-3,
    weight_decay=1e-6,
    projector_hidden=512,
    prototypes=512,
    freeze_epochs=0,
    source="lightly's benchmark",
    result="kNN 81.2 %",
    notes=_LIGHTLY_OURS,
)
_add(
    "dino-cifar10-200ep",
    _LIGHTLY,
    recipe="cifar-byol",
    crop_min=0.4,
    projector_layers=2,
    prototypes=2048,
    ema=0.99,
    ema_schedule="constant",
    freeze_epochs=0,
    source="lightly's benchmark",
    result="kNN 84.0 %",
    notes=_LIGHTLY_OURS,
)
_OURS = "All of it is ours: lightly's settings for the other methods, T 0.2."
_add(
    "mocov3-cifar10-200ep",
    _LIGHTLY,
    _LIGHTLY_BYOL,
    temperature=0.2,
    source="ours",
    notes=_OURS,
)
_add(
    "fastmoco-cifar10-200ep",
    _LIGHTLY,
    crop_min=0.2,
    temperature=0.2,
    clip_norm=1.0,
    source="ours",
    notes=_OURS + " Heads and clipping are Fast-MoCo's; tiles have 16 px.",
)

# ------------------------------------------------------------------ Imagenette: ten classes of ImageNet, for a CPU

# Small network, small views without blur, FastSiam's small batch and large rate.
_IMAGENETTE = {"size": 64, "blur": 0.0, "backbone": "resnet18", "batch_size": 32, "schedule": "step", **_FASTSIAM_LR}
_add(
    "fastsiam-imagenette-12ep",
    _IMAGENETTE,
    source="ours, benchmarks/records",
    result="kNN 51.3 % (random initialisation: 30.8 %)",
)
_add(
    "simsiam-imagenette-24ep",
    _IMAGENETTE,
    source="ours, benchmarks/records",
    result="kNN 50.6 %, with as many view passes",
)

# What `python -m benchmarks.methods` runs: every method and add-on, 8 view passes per image, ten minutes on a core.
_NETTE = _IMAGENETTE | {"recipe": "imagenet", "knn_every": 0}
_EMA = {"ema": 0.99, "ema_schedule": "constant"}
_NETTE_FASTMOCO = _NETTE | _EMA | {"clip_norm": 1.0}
_NETTE_DINO = _NETTE | _EMA | {"lr": 0.06, "clip_norm": 3.0, "prototypes": 1024, "freeze_epochs": 0}
_NETTE_CROPS = {"num_local": 6, "local_size": 32}
_NETTE_GUIDED = _NETTE | {"guided_views": 2}
_NETTE_ROWS: dict[str, tuple[Mapping[str, Any], str]] = {
    "simsiam-imagenette-4ep": (_NETTE, "37.6"),
    "fastsiam-imagenette-2ep": (_NETTE, "35.7"),
    "byol-imagenette-4ep": (_NETTE | _EMA | {"lr": 0.06}, "34.6"),
    "mocov2-imagenette-4ep": (
        # At FastSiam's rate keys collapse while the queue still holds the random rows of its start.
        _NETTE | _EMA | {"lr": 0.015, "symmetric": True, "queue_size": 4096, "bn_splits": 4},
        "34.8",
    ),
    "mocov3-imagenette-4ep": (_NETTE | _EMA | {"lr": 0.06, "temperature": 0.2}, "43.9"),
    "fastmoco-imagenette-4ep": (_NETTE_FASTMOCO, "39.5"),
    "nnclr-imagenette-4ep": (_NETTE | {"lr": 0.06, "queue_size": 4096}, "43.0"),
    "swav-imagenette-4ep": (
        _NETTE | {"optimizer": "adam", "lr": 1e-3, "weight_decay": 1e-6, "prototypes": 512, "freeze_epochs": 0},
        "35.3",
    ),
    "dino-imagenette-4ep": (_NETTE_DINO, "35.7"),
    "simsiam-guided-imagenette-4ep": (_NETTE_GUIDED | {"guided": "guided"}, "31.6"),
    "simsiam-random-imagenette-4ep": (_NETTE_GUIDED | {"guided": "random"}, "33.7"),
    "simsiam-reversed-imagenette-4ep": (_NETTE_GUIDED | {"guided": "reversed"}, "32.5"),
    "simsiam-patches-imagenette-4ep": (_NETTE | {"patches": "divide-encode-combine"}, "38.5"),
    "fastmoco-off-imagenette-4ep": (_NETTE_FASTMOCO | {"patches": "off"}, "35.3"),
    "dino-multicrop-imagenette-4ep": (_NETTE_DINO | _NETTE_CROPS, "34.6"),
    "dino-sslight-imagenette-4ep": (
        _NETTE_DINO | _NETTE_CROPS | {"alpha": 0.4, "crop_min": 0.3, "local_scale": (0.05, 0.3)},
        "36.6",
    ),
}
for _name, (_values, _knn) in _NETTE_ROWS.items():
    _add(_name, _values, source="ours, benchmarks/records", result=f"kNN {_knn} % (random initialisation: 30.8 %)")

# ------------------------------------------------------------------ demo

PRESETS["demo"] = Preset(
    "demo",
    "fastsiam",
    {
        # Many small steps and narrow heads: with so few images the number of steps is what counts.
        "projector_layers": 2,
        "projector_hidden": 512,
        "dim": 512,
        "predictor_hidden": 128,
        "backbone": "resnet18",
        "size": 48,
        "blur": 0.0,  # sigma up to 2 px leaves little of a 48 px view
        "epochs": 3,
        "batch_size": 16,
        "lr": 0.125,
        "lr_batch_size": 16,
        "schedule": "step",
        "knn_every": 1,
    },
    source="ours: what `make demo` runs",
    result="kNN 35.0 % on generated shapes",
    num_images=4_000,
)
