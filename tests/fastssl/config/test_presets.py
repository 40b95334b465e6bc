"""Presets: names, what the papers' tables say of their rates, crops and heads, and what they are estimated to cost."""

from __future__ import annotations

import importlib
import io
import pkgutil
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from fastssl import methods
from fastssl.config import presets
from fastssl.config import schema as configs
from fastssl.config.command_line import parse
from fastssl.config.presets import PRESETS
from fastssl.config.schema import RunConfig
from fastssl.losses.multicrop import rebalanced_weights
from fastssl.networks.backbones import backbone
from fastssl.planning.cost import ASSUMED_VIEWS_PER_S, cost
from fastssl.planning.listing import list_presets, preset_table
from fastssl.train import main
from fastssl.training.build import make_method, make_views
from fastssl.training.log import figures
from fastssl.training.optimizers import lr_at, scaled_lr
from loaders import UserError

IMAGENET = 1_281_167


def load(name: str) -> RunConfig:
    return configs.replace(presets.load(name), data="x.beton")


# ------------------------------------------------------------------ all of them


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_valid_configuration_named_after_it(name: str) -> None:
    preset, config = PRESETS[name], load(name)
    configs.validate(config)
    assert configs.from_dict(configs.to_dict(config), "here") == config
    assert scaled_lr(config.optim, config.data.batch_size) > config.optim.min_lr
    assert (config.preset, config.model.method) == (name, preset.method)
    assert preset.source and preset.result
    batch, options = config.data.batch_size, config.method_options
    assert batch % getattr(options, "bn_splits", 1) == 0
    assert getattr(options, "queue_size", 0) % batch == 0
    if name != "demo":
        scheme = rf"({'|'.join(methods.available())})(-[a-z0-9]+)*-(imagenet|imagenette|cifar10)-(\d+)ep"
        method, _, dataset, epochs = re.fullmatch(scheme, name).groups()
        assert (method, int(epochs)) == (preset.method, config.optim.epochs)
        assert preset.num_images == {"imagenet": IMAGENET, "imagenette": 9_469, "cifar10": 50_000}[dataset]
        assert (config.data.size, config.model.backbone.endswith("-cifar")) == {
            "imagenet": (224, False),
            "imagenette": (64, False),
            "cifar10": (32, True),
        }[dataset]


def networks() -> list[str]:
    """A preset for every combination of a network and the sizes that it sees."""
    seen: dict[tuple, str] = {}
    for name in PRESETS:
        config = load(name)
        spec = make_views(config)
        seen.setdefault((config.model.backbone, spec.divide, *spec.sizes), name)
    return list(seen.values())


@pytest.mark.parametrize("name", networks())
def test_its_network_can_be_built(name: str) -> None:  # heads of all presets: test_list_has_one_line_for_each_preset
    with torch.device("meta"):
        method = make_method(load(name))
    assert any(p.requires_grad for p in method.backbone.parameters())


@pytest.mark.parametrize("name", [n for n, p in PRESETS.items() if p.rows])
def test_the_options_of_further_rows_exist(name: str) -> None:
    for options in PRESETS[name].rows:
        words = options.split()
        config = parse([name, "--data", "x.beton", *words])
        configs.validate(config)
        make_views(config)
        flat = {k: v for group in configs.to_dict(config).values() if isinstance(group, dict) for k, v in group.items()}
        for flag, value in zip(words[::2], words[1::2], strict=True):
            assert str(flat[flag.removeprefix("--").replace("-", "_")]) == value


def test_every_method_has_presets_on_imagenet_and_cifar() -> None:
    for method in methods.available():
        names = [p.name for p in PRESETS.values() if p.method == method]
        assert "imagenet" in names[0], "the first one is what --method begins with"
        assert f"{method}-cifar10-200ep" in names


# ------------------------------------------------------------------ what the sources' tables say


@dataclass(frozen=True)
class Published:
    """A row of a source: rates are those at the batch, clip is the largest norm, ema begins at its first value."""

    names: str
    batch: int
    rate: float
    optimizer: str = "sgd"
    decay: float = 1e-4
    decay_end: float | None = None
    no_decay: str = "none"
    clip: float | None = None
    warmup: tuple[int, float] = (0, 1)  # epochs, and the share of the rate that it begins with
    last: float = 0.0
    ema: tuple[float, str] | None = None


def lars(names: str, batch: int, rate: float, **more: Any) -> Published:
    return Published(names, batch, rate, **{"optimizer": "lars", "decay": 1e-6, "warmup": (10, 0)} | more)


COSINE, CONSTANT = "cosine", "constant"
PUBLISHED = [
    Published("fastsiam-imagenet-25ep fastsiam-imagenet-10ep", 32, 0.125),
    Published("simsiam-imagenet-100ep simsiam-imagenet-800ep", 256, 0.05),
    Published("simsiam-guided-imagenet-100ep", 512, 0.1),
    Published("byol-guided-imagenet-100ep byol-unguided-imagenet-100ep", 512, 0.1, ema=(0.99, CONSTANT)),
    Published("simsiam-guided-cifar10-200ep", 512, 0.06, decay=5e-4, last=0.06),
    Published("byol-guided-cifar10-200ep", 512, 0.06, decay=5e-4, last=0.06, ema=(0.99, CONSTANT)),
    Published(
        "fastmoco-imagenet-100ep fastmoco-imagenet-200ep fastmoco-imagenet-400ep byol-patches-imagenet-100ep",
        512, 0.1, clip=1.0, warmup=(1, 0.25), ema=(0.99, CONSTANT),
    ),
    Published("simsiam-patches-imagenet-100ep", 512, 0.1, clip=1.0, warmup=(1, 0.25)),
    Published("mocov2-imagenet-200ep mocov2-imagenet-800ep", 256, 0.03, ema=(0.999, CONSTANT)),
    lars("mocov3-imagenet-100ep", 4096, 9.6, no_decay="1d", ema=(0.99, COSINE)),
    lars("mocov3-imagenet-300ep", 4096, 4.8, no_decay="1d", ema=(0.99, COSINE)),
    lars("mocov3-imagenet-1000ep", 4096, 4.8, no_decay="1d", decay=1.5e-6, ema=(0.996, COSINE)),
    lars("byol-imagenet-100ep", 4096, 7.2, no_decay="1d", ema=(0.99, COSINE)),
    lars("byol-imagenet-1000ep", 4096, 3.2, no_decay="1d", decay=1.5e-6, ema=(0.996, COSINE)),
    lars("nnclr-imagenet-100ep", 4096, 4.8, no_decay="1d"),
    lars("swav-imagenet-100ep swav-imagenet-800ep", 4096, 4.8, warmup=(10, 0.0625), last=0.0048),
    lars("swav-bs256-imagenet-200ep swav-bs256-imagenet-400ep", 256, 0.6, warmup=(0, 1), last=0.0006),
    Published(
        "dino-imagenet-100ep",
        512, 0.06, no_decay="1d", clip=3.0, warmup=(10, 0), last=1e-6, ema=(0.996, COSINE),
    ),
    lars(
        "dino-sslight-r18-imagenet-200ep dino-sslight-r34-imagenet-200ep dino-multicrop-mnv2-imagenet-200ep",
        1024, 1.92, no_decay="1d+depthwise", last=0.0048, ema=(0.996, COSINE),
    ),
    lars(
        "mocov2-sslight-mnv2-imagenet-200ep",
        1024, 1.92, no_decay="1d+depthwise", last=0.0048, ema=(0.999, CONSTANT),
    ),
    lars(
        "swav-sslight-mnv2-imagenet-200ep swav-multicrop-mnv2-imagenet-200ep",
        1024, 1.2, no_decay="1d+depthwise", warmup=(10, 0.0625), last=0.0048,
    ),
    Published(
        "dino-sslight-vit-t16-imagenet-200ep dino-sslight-vit-t32-imagenet-200ep dino-multicrop-vit-s16-imagenet-200ep",
        1024, 2e-3, "adamw", 0.04, 0.4, "1d", warmup=(10, 0), last=1e-5, ema=(0.996, COSINE),
    ),
    Published("simsiam-cifar10-800ep", 512, 0.06, decay=5e-4),
    Published("fastsiam-cifar10-200ep simsiam-cifar10-200ep nnclr-cifar10-200ep", 128, 0.06, decay=5e-4),
    Published(
        "byol-cifar10-200ep mocov2-cifar10-200ep dino-cifar10-200ep", 128, 0.06, decay=5e-4, ema=(0.99, CONSTANT)
    ),
    Published("swav-cifar10-200ep", 128, 1e-3, "adam", 1e-6),
    Published("fastsiam-imagenette-12ep simsiam-imagenette-24ep", 32, 0.125),
    Published("demo", 16, 0.125),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row"), [(name, row) for row in PUBLISHED for name in row.names.split()])
def test_optimisation_is_the_sources(name: str, row: Published) -> None:
    config, steps = load(name), 100  # per epoch
    optim, options = config.optim, vars(config.method_options)
    assert config.data.batch_size == row.batch
    assert (optim.optimizer, optim.weight_decay, optim.weight_decay_end) == (row.optimizer, row.decay, row.decay_end)
    clips_each = name.startswith("dino")
    assert (optim.no_decay, optim.clip_each_norm if clips_each else optim.clip_norm) == (row.no_decay, row.clip)
    assert ((options["ema"], options["ema_schedule"]) if "ema" in options else None) == row.ema
    base = scaled_lr(optim, row.batch)
    assert base == pytest.approx(row.rate)
    epochs, share = row.warmup
    assert lr_at(optim, base, 0, steps) == pytest.approx(share * row.rate)
    assert lr_at(optim, base, epochs * steps, steps) == pytest.approx(row.rate)
    assert lr_at(optim, base, optim.epochs * steps, steps) == pytest.approx(row.last, abs=1e-8)


@pytest.mark.parametrize(
    ("network", "variant", "scale", "local_scale", "local_size", "num_local", "alpha"),
    [
        ("r18", "multicrop", 0.14, (0.05, 0.14), 96, 6, 1 / 7),
        ("mnv2", "sslight", 0.3, (0.05, 0.3), 128, 6, 0.4),
        ("vit-t16", "multicrop", 0.25, (0.05, 0.25), 96, 10, 1 / 11),
        ("vit-s16", "sslight", 0.3, (0.05, 0.3), 128, 10, 0.4),
    ],
)
def test_crops_and_weights_of_sslight(
    network: str, variant: str, scale: float, local_scale: tuple, local_size: int, num_local: int, alpha: float
) -> None:
    config = load(f"dino-{variant}-{network}-imagenet-200ep")
    views = make_views(config).views
    assert [v.size for v in views] == [224, 224, *[local_size] * num_local]
    assert [v.scale for v in views] == [(scale, 1.0)] * 2 + [local_scale] * num_local
    assert [v.blur_p for v in views] == [1.0, 0.1] + [0.5] * num_local
    assert [v.solarize_p for v in views] == [0.0, 0.2] + [0.0] * num_local
    assert {v.interpolation for v in views} == {"bicubic"}
    w = rebalanced_weights(len(views), 2, config.method_options.alpha)
    assert w[0][1] + w[1][0] == pytest.approx(alpha)
    assert config.model.drop_path == (0.1 if network.startswith("vit") else 0.0)


def test_crops_of_the_others() -> None:
    def scales(name: str) -> set[tuple[float, float]]:
        return {v.scale for v in make_views(load(name)).views}

    assert scales("simsiam-imagenet-100ep") == scales("mocov3-imagenet-100ep") == {(0.2, 1.0)}
    assert scales("byol-imagenet-100ep") == scales("byol-guided-cifar10-200ep") == {(0.08, 1.0)}
    assert scales("swav-imagenet-100ep") == scales("dino-imagenet-100ep") == {(0.14, 1.0), (0.05, 0.14)}
    tiles = make_views(load("fastmoco-imagenet-100ep"))
    assert (tiles.divide, tiles.sizes, tiles.views[0].interpolation) == (2, (224, 224), "bicubic")
    assert make_views(load("simsiam-guided-imagenet-100ep")).K == 4
    assert make_views(load("simsiam-unguided-imagenet-100ep")).K == 2
    assert not any(v.blur_p for n in PRESETS if "cifar10" in n for v in make_views(load(n)).views)


def build(name: str) -> nn.Module:
    with torch.device("meta"):
        return make_method(load(name))


HEADS = {  # widths of the Linear layers and whether they have biases; of the prototypes: (number, width)
    "simsiam-imagenet-100ep": {"projector": "2048 2048 2048 2048", "predictor": "2048 512 2048+"},
    "byol-guided-imagenet-100ep": {"projector": "2048 2048 2048 2048", "predictor": "2048 512 2048+"},
    "byol-guided-cifar10-200ep": {"projector": "512 2048 2048", "predictor": "2048 512 2048+"},
    "byol-imagenet-100ep": {"projector": "2048 4096+ 256", "predictor": "256 4096+ 256"},
    "byol-cifar10-200ep": {"projector": "512 1024 256+", "predictor": "256 1024 256+"},
    "mocov2-cifar10-200ep": {"projector": "512 512+ 128+"},
    "mocov2-sslight-mnv2-imagenet-200ep": {"projector": "1280 2048+ 128+"},
    "nnclr-cifar10-200ep": {"projector": "512 2048 256"},
    "swav-cifar10-200ep": {"projector": "512 512+ 128+", "prototypes": (512, 128)},
    "swav-sslight-mnv2-imagenet-200ep": {"projector": "1280 4096+ 128+"},
    "dino-cifar10-200ep": {"projector": "512 2048+ 256+", "prototypes": (2048, 256)},
    "dino-sslight-r18-imagenet-200ep": {"projector": "512 2048+ 2048+ 256+", "prototypes": (4096, 256)},
    "dino-sslight-vit-t16-imagenet-200ep": {"projector": "192 2048+ 2048+ 256+", "prototypes": (65536, 256)},
    "demo": {"projector": "512 512 512", "predictor": "512 128 512+"},
}


def widths(net: nn.Module) -> str | tuple[int, ...]:
    layers = [m for m in net.modules() if isinstance(m, nn.Linear)] if isinstance(net, nn.Sequential) else []
    if not layers:
        return tuple(net.weight.shape)
    outputs = (f"{m.out_features}{'' if m.bias is None else '+'}" for m in layers)
    return " ".join([str(layers[0].in_features), *outputs])


@pytest.mark.parametrize("name", HEADS)
def test_heads_are_the_sources(name: str) -> None:
    method = build(name)
    assert {part: widths(getattr(method, part)) for part in HEADS[name]} == HEADS[name]


def norms(name: str) -> list[bool]:
    """Whether the projector's BatchNorms have scales and shifts, layer by layer."""
    return [m.affine for m in build(name).projector if isinstance(m, _BatchNorm)]


def test_norms_of_the_heads() -> None:
    assert norms("simsiam-imagenet-100ep") == norms("byol-guided-imagenet-100ep") == [True, True, False]
    assert norms("simsiam-cifar10-200ep")[-1] and not norms("fastsiam-cifar10-200ep")[-1]
    assert norms("dino-sslight-r18-imagenet-200ep") and not norms("dino-sslight-vit-t16-imagenet-200ep")
    assert build("dino-sslight-r18-imagenet-200ep").prototypes.length is None
    assert build("dino-sslight-vit-t16-imagenet-200ep").prototypes.length is not None
    assert load("byol-imagenet-100ep").method_options.sum_directions
    assert not load("byol-guided-imagenet-100ep").method_options.sum_directions


# ------------------------------------------------------------------ costs


def products(name: str, size: int) -> int:
    """What torch's own counter finds in the forward pass of one image."""
    with torch.device("meta"):
        net, _ = backbone(name, size=224)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net.eval()(torch.empty(1, 3, size, size))
    return counter.get_total_flops()


@pytest.mark.parametrize("family", [module.name for module in pkgutil.iter_modules(presets.__path__)])
def test_a_family_says_its_command_its_result_and_its_cost(family: str) -> None:
    """The docstring's figures are those of the preset in its command."""
    module = importlib.import_module(f"{presets.__name__}.{family}")
    text = " ".join(module.__doc__.split())
    preset = PRESETS[re.search(r" fastssl-train (\S+) --data ", text)[1]]
    assert preset in module.PRESETS
    result = re.search(r"[\d.-]+", preset.result)
    assert (result[0] if result else "nothing") in text
    found = cost(preset.make(), preset.num_images)
    hours = figures(found.hours) if found.hours >= 0.01 else "<0.01"
    assert f"Cost: {figures(found.views / 1e6)} M views, {hours} hours" in text


def test_cost_of_fastsiam_by_hand() -> None:
    found = cost(load("fastsiam-imagenet-25ep"), IMAGENET)
    assert found.views == IMAGENET * 25 * 4 == 128_116_700
    heads = 3 * 2048 * 2048 + 2 * 2048 * 512  # projector and predictor, products
    assert found.flops == pytest.approx(found.views * 3 * (products("resnet50", 224) + 2 * heads), rel=1e-9)
    assert products("resnet50", 224) == pytest.approx(2 * 4.09e9, rel=1e-3)  # torchvision's figure, in products
    assert found.hours == pytest.approx(found.views / ASSUMED_VIEWS_PER_S / 3600, rel=0.01)


def test_cost_counts_targets_once_and_tiles_and_small_crops_at_their_size() -> None:
    large, tile, crop = (products("resnet50", size) for size in (224, 112, 96))

    def per_image(name: str) -> float:
        config = load(name)
        return cost(config, 1).flops / config.optim.epochs

    # Heads and losses are what is left: a few per cent.
    assert 1 < per_image("byol-imagenet-100ep") / (2 * 4 * large) < 1.03
    assert 1 < per_image("mocov2-imagenet-200ep") / (3 * large + large) < 1.03
    assert 1 < per_image("fastmoco-imagenet-100ep") / (2 * (3 * 4 * tile + large)) < 1.03
    assert 1 < per_image("simsiam-patches-imagenet-100ep") / (2 * (3 * 4 * tile + large)) < 1.03
    assert 1 < per_image("dino-imagenet-100ep") / (3 * (2 * large + 8 * crop) + 2 * large) < 1.03
    assert 1 < per_image("swav-imagenet-100ep") / (3 * (2 * large + 6 * crop)) < 1.03


# ------------------------------------------------------------------ command line


def listed(capsys: pytest.CaptureFixture, *words: str) -> str:
    assert main(["--list", *words]) == 0
    return capsys.readouterr().out


def test_list_has_one_line_for_each_preset_in_a_pipe(capsys: pytest.CaptureFixture) -> None:
    lines = listed(capsys).splitlines()
    for preset in PRESETS.values():
        (line,) = [line for line in lines if line.startswith(preset.name + " ")]
        assert preset.source in line and preset.result in line
        assert re.search(r"(\s+(<0\.01|[\d,.]+)){3}\s*$", line), line
    assert any("15.7 TFLOP/s" in line and "assume" in line for line in lines)


def test_list_takes_words(capsys: pytest.CaptureFixture) -> None:
    text = listed(capsys, "dino", "r18")
    assert "dino-sslight-r18-imagenet-200ep" in text and "r34" not in text and "simsiam" not in text
    text = listed(capsys, "fastmoco-imagenet-100ep")
    assert "--patches montage" in text and "linear 70.4 %" in text and "--target-init independent" in text
    with pytest.raises(UserError, match="no preset has that"):
        list_presets(["moco-v4"])


def test_list_fits_120_columns() -> None:
    console = Console(width=120, file=io.StringIO())
    console.print(preset_table(PRESETS.values()))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 120
    assert all(any(line.startswith(name + " ") for line in lines) for name in PRESETS)


def test_method_alone_begins_with_its_first_preset() -> None:
    for method in methods.available():
        config = parse(["--data", "x.beton", "--method", method])
        first = next(p for p in PRESETS.values() if p.method == method)
        expected = configs.replace(presets.load(first.name), data="x.beton", batch_size=32)
        expected.preset = ""
        assert config == expected
        configs.validate(config)
    byol = parse(["--data", "x.beton", "--method=byol", "--seed", "3"])
    assert (byol.optim.optimizer, byol.data.recipe, byol.run.seed) == ("lars", "byol", 3)
    assert scaled_lr(byol.optim, byol.data.batch_size) == pytest.approx(0.45 * 32 / 256)


def test_without_preset_and_method_it_is_fastsiam_with_the_defaults() -> None:
    config = parse(["--data", "x.beton"])
    assert config == configs.replace(configs.typed_config("fastsiam")(), data="x.beton")
    assert config == parse(["--data", "x.beton", "--method", "fastsiam"])


def test_a_preset_under_another_method_keeps_its_optimisation() -> None:
    config = parse(["fastsiam-cifar10-200ep", "--data", "x.beton", "--method", "byol"])
    preset = load("fastsiam-cifar10-200ep")
    assert (config.data, config.optim) == (preset.data, preset.optim)
    assert config.model.method == "byol" and config.model.backbone == "resnet18-cifar"


def test_a_method_without_presets_begins_with_its_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "PRESETS", {n: p for n, p in PRESETS.items() if p.method != "nnclr"})
    config = parse(["--data", "x.beton", "--method", "nnclr"])
    assert config.model.method == "nnclr" and config.preset == ""
    assert config.optim == configs.Optim()
    with pytest.raises(UserError, match="did you mean 'nnclr'"):
        parse(["--data", "x.beton", "--method", "nncrl"])


def test_synchronised_batchnorm_is_no_obstacle_to_one_process(beton, tmp_path) -> None:
    small = "--backbone resnet18 --size 32 --batch-size 8 --dim 32 --projector-hidden 16 --predictor-hidden 8"
    assert load("simsiam-imagenet-100ep").model.sync_bn
    arguments = ["simsiam-imagenet-100ep", "--data", str(beton), "--out", str(tmp_path / "run"), *small.split()]
    assert main([*arguments, "--max-steps", "1"]) == 0
