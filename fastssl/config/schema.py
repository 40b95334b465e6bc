"""The typed configuration of a run. Every field is a command-line flag; `fastssl-train --help` is made from this file.

A run's configuration has five groups of options. Those of the method are the option class of methods/NAME.py, so that a
flag which the method does not read does not exist. Flags that are read only beside certain values of other flags are
declared as such (`READ_IF`, fastssl/conditions.py) and refused beside others.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import typing
from collections.abc import Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml

from fastssl import methods
from fastssl.conditions import Condition, above, conditions, given, one_of, starts_with
from fastssl.methods.base import MethodOptions
from loaders.checks import Options, above_zero, at_least, flag, need, share
from loaders.errors import UserError
from loaders.help_texts import flowing


def _sizes(words: list[str]) -> tuple[int, ...]:
    return tuple(int(word) for word in words[0].split(":")) if words[0] != "None" else ()


SizeSchedule = Annotated[
    tuple[int, ...],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PX:PX:...",
        instance_from_str=_sizes,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda sizes: [":".join(map(str, sizes)) or "None"],
    ),
]


@dataclass(kw_only=True)
class Data(Options):
    """Data and views"""

    data: str = ""
    """Training images: a .beton file made by fastssl-convert, or several (a.beton,b.beton or 'part-{00..15}.beton').
    Labels in them are never used for training."""
    val: str | None = None
    """Validation images, in the same forms: switches the kNN monitor on, with --data as its bank."""
    size: int = 224
    """Side of the square views, px."""
    size_schedule: SizeSchedule = ()
    """Sizes for equal shares of the epochs, the last one --size: 128:160:224. Small views first cost less (progressive
    resizing). None: --size throughout."""
    recipe: Literal["imagenet", "fastmoco", "byol", "mocov3", "swav", "cifar", "cifar-byol"] = "imagenet"
    """Augmentation. imagenet: MoCo v2's (crops of 0.2-1 of the area, jitter, gray, blur, flip). fastmoco: the same,
    bicubic. byol: two unlike views (blur 1 and 0.1, solarize), crops of 0.08-1, bicubic. mocov3: the same, crops of
    0.2-1, bilinear. swav: strong jitter. cifar: crops of 0.08-1, no blur (SimSiam appendix D). cifar-byol: byol
    without blur."""
    crop_min: float | None = None
    """Smallest crop, share of the image's area. None: the recipe's."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """Resampling of the crops. None: the recipe's."""
    blur: float | None = None
    """Probability of Gaussian blur, sigma 0.1-2 px. None: the recipe's (0.5; 0 for cifar)."""
    batch_size: int = 32
    """Images per step, over all processes (each image is seen in all its views)."""
    backend: str = "auto"
    """Decoder: auto (the fastest here, by measurement), cpu (libjpeg-turbo in threads), dali (on the GPU), ffcv,
    resident (everything decoded beforehand, in memory), or synthetic (no pixels, to measure the network alone)."""
    order: Literal["random", "page"] = "random"
    """random: one permutation of all images. page: the file's pages in random order, images shuffled within
    --page-window pages: for hard disks and for files larger than memory."""
    page_window: int = 64
    """Pages (of 8 MiB, usually) to shuffle together; about twice as many are in memory."""
    workers: int | None = None
    """Decoding threads per process. None: all cores on a CPU, all but one beside a GPU."""
    prefetch: int = 3
    """Batches prepared ahead of training."""
    on_bad_sample: Literal["raise", "skip"] = "raise"
    """A stored image that does not decode: stop and name it, or take the next one instead."""

    READ_IF = {"page_window": one_of("order", "page")}

    def validate(self) -> None:
        """Raise UserError for values that make no sense."""
        need(bool(self.data), "no training data: give --data TRAIN.beton (made by fastssl-convert)")
        at_least(self, 8, "size")
        need(
            not self.size_schedule or (self.size_schedule[-1] == self.size and min(self.size_schedule) >= 8),
            f"--size-schedule {':'.join(map(str, self.size_schedule))}: 8 px or more, the last one --size {self.size}",
        )
        need(self.batch_size >= 2, f"--batch-size {self.batch_size}: BatchNorm needs at least 2 images per step")
        at_least(self, 1, "prefetch", "page_window", "workers")
        share(self, "crop_min", "blur")
        above_zero(self, "crop_min")


@dataclass(kw_only=True)
class Model(Options):
    """Network and method"""

    method: str = "fastsiam"
    """Name of a file in fastssl/methods."""
    backbone: str = "resnet50"
    """resnet18, resnet34, resnet50 (torchvision), the same with -cifar (3x3 stem, no max-pool), mobilenet_v2
    (torchvision), vit-t32, vit-t16, vit-s16 (class token as features) or timm/NAME."""
    zero_init_residual: bool = True
    """Start residual branches at zero (Goyal et al. 2017), as SimSiam's code does; ResNets and models of timm."""
    drop_path: float = 0.0
    """Probability that an image skips the last block in training, falling linearly to 0 at the first one: stochastic
    depth (SSLight's DINO with a ViT: .1). ViTs and models of timm; never in momentum targets."""
    bn_statistics: Literal["view", "joint"] = "view"
    """BatchNorm's statistics where a method encodes views one by one: of each view by itself (view), or of all views of
    a size together (joint). SwAV and DINO are joint in any case."""
    sync_bn: bool = False
    """BatchNorm statistics over all processes (SimSiam section 3 uses it on 8 GPUs)."""
    activation_checkpointing: bool = False
    """Keep only the input of each of the backbone's blocks for the backward pass and compute the rest again: a fraction
    of the memory for a third to a half more time, with the same results."""

    READ_IF = {
        "zero_init_residual": starts_with("backbone", "resnet", "timm/"),
        "drop_path": starts_with("backbone", "vit-", "timm/"),
    }


@dataclass(kw_only=True)
class Optim(Options):
    """Optimisation"""

    epochs: int = 25
    """Passes over the data."""
    optimizer: Literal["sgd", "lars", "adamw", "adam"] = "sgd"
    """sgd, lars (SGD adapted layer by layer, for large batches: You et al. 2017), adamw, or adam (its decay goes into
    the gradient)."""
    lr: float = 0.125
    """Learning rate at --lr-batch-size images per step; scaled linearly to --batch-size (FastSiam section 4.1: 0.125 at
    32; SimSiam section 3: 0.05 at 256)."""
    lr_batch_size: int = 32
    """The batch size that --lr was tuned for, images. 0: --lr is not scaled, at any batch size."""
    momentum: float = 0.9
    """Momentum of sgd and lars (adam's and adamw's betas are .9 and .999)."""
    weight_decay: float = 1e-4
    """Weight decay (SimSiam section 3; 5e-4 on CIFAR, appendix D)."""
    weight_decay_end: float | None = None
    """Weight decay at the end: a cosine from --weight-decay to it, changed at every step (DINO with a ViT: .04 to .4).
    None: constant."""
    no_decay: Literal["none", "1d", "1d+depthwise"] = "none"
    """Parameters without weight decay. none: no parameter (SimSiam); 1d: biases, norms and others of one dimension,
    which lars does not adapt either (MoCo v3, DINO); 1d+depthwise: also the weights of depth-wise convolutions, which
    lars does adapt (SSLight)."""
    trust_coefficient: float = 0.001
    """lars: at rate 1 a layer's weights move by this share of their own norm (eta)."""
    warmup_epochs: float = 0.0
    """Linear warm-up, epochs; its last step is at the full rate (SimSiam needs none)."""
    warmup_start: float = 0.0
    """Rate at the start of warm-up, share of the full rate (Fast-MoCo: .25, SwAV: .0625)."""
    schedule: Literal["epoch", "step", "constant"] = "epoch"
    """Cosine decay to --min-lr, changed once per epoch (SimSiam's code) or at every step (better for few epochs); or
    constant after warm-up (GSG on CIFAR)."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine, which is not scaled with the batch (SwAV, SSLight: .0048)."""
    clip_norm: float | None = None
    """Largest norm of the gradient of all parameters together (Fast-MoCo: 1). None: not clipped."""
    clip_each_norm: float | None = None
    """Largest norm of the gradient of each parameter by itself (DINO's --clip_grad: 3). None: not clipped."""

    READ_IF = {
        "momentum": one_of("optimizer", "sgd", "lars"),
        "trust_coefficient": one_of("optimizer", "lars"),
        "warmup_start": above("warmup_epochs", 0),
    }

    def validate(self) -> None:
        """Raise UserError for values that make no sense."""
        at_least(self, 1, "epochs")
        above_zero(self, "lr", "trust_coefficient", "clip_norm", "clip_each_norm")
        at_least(self, 0, "lr_batch_size", "weight_decay", "weight_decay_end", "min_lr")
        need(0 <= self.momentum < 1, f"--momentum {self.momentum}: in [0, 1)")
        share(self, "warmup_start")
        need(
            0 <= self.warmup_epochs < self.epochs,
            f"--warmup-epochs {self.warmup_epochs}: from 0 to less than --epochs {self.epochs} (a tenth of them, or 0)",
        )
        need(
            self.min_lr == 0 or self.schedule != "constant",
            f"--min-lr {self.min_lr} is the end of a cosine, --schedule constant has none: use --schedule step",
        )


@dataclass(kw_only=True)
class Run(Options):
    """This run"""

    out: Path | None = None
    """Run folder. None: runs/NAME, NAME from the preset (or the method) and the data file."""
    seed: int = 0
    """Seed of weights, order and views: same seed, same run."""
    resume: bool = False
    """Continue the run in --out where it stopped, in mid-epoch if need be, with the configuration that is there."""
    overwrite: bool = False
    """Throw away the run that --out holds."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the training. auto: cuda if there is one."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Number format of the network's products and activations; reductions and losses are in fp32 always. auto: bf16
    where the device has it, fp16 with loss scaling on Turing GPUs, fp32 elsewhere."""
    compile: Literal["auto", "on", "off", "reduce-overhead"] = "auto"
    """torch.compile for the backbone, and for heads and loss as one graph. auto: on CUDA only (on a CPU it gains little
    and needs a compiler). reduce-overhead: with CUDA graphs, for small images and networks; takes more memory."""
    micro_batch: int | None = None
    """Images (of a process) that go through the network at a time, for batches that are too large for the card. Losses
    and gradients are those of the whole batch, whatever the method, with BatchNorm over this many images. None: all."""
    plan: bool = False
    """Train nothing: measure the parts of this run for some seconds and say what it will cost (hours, memory, disk),
    here and on other cards."""
    fit: float | None = None
    """Hours that the run may take: do as --plan does, and list epochs, views and sizes that meet them."""
    max_steps: int | None = None
    """Stop after this many steps in all (the learning rate still follows --epochs). None: run to the end."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl; each one waits for the device."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints; one is also written after every epoch."""
    knn_every: int = 5
    """Epochs between kNN evaluations, if --val is given (0: only after the last)."""
    knn_k: int = 20
    """Neighbours that vote in the monitor."""
    knn_temperature: float = 0.07
    """T of the votes in the monitor, which weigh exp(cosine / T) (Wu et al. 2018)."""
    knn_bank: int = 50_000
    """Training images in the monitor's bank, at most."""
    recalibrate_bn: int = 0
    """Training images, cropped and sized as for evaluation, from which BatchNorm's statistics are computed anew: those
    of training are of random crops or tiles. For the monitor, and for a second file of weights at the end (10000 is
    plenty). 0: do not."""

    READ_IF = dict.fromkeys(("knn_every", "knn_k", "knn_temperature", "knn_bank"), given("val"))

    def validate(self) -> None:
        """Raise UserError for values that make no sense."""
        at_least(self, 1, "log_every", "knn_k", "max_steps")
        at_least(self, 0, "checkpoint_minutes")
        above_zero(self, "knn_temperature", "fit")
        need(self.micro_batch is None or self.micro_batch >= 2, f"--micro-batch {self.micro_batch}: 2 images or more")
        need(
            self.recalibrate_bn == 0 or self.recalibrate_bn >= 2,
            f"--recalibrate-bn {self.recalibrate_bn}: 2 images or more",
        )
        need(
            not (self.resume and self.overwrite),
            "--resume and --overwrite exclude each other: continue the run, or replace it",
        )


@dataclass(kw_only=True)
class RunConfig:
    """Pre-train an image backbone without labels on one GPU (or a CPU)."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    method_options: MethodOptions = field(default_factory=MethodOptions)
    optim: Optim = field(default_factory=Optim)
    run: Run = field(default_factory=Run)
    preset: tyro.conf.Suppress[str] = ""

    def __post_init__(self) -> None:
        if type(self.method_options) is MethodOptions:  # not given
            self.method_options = methods.load(self.model.method).Config()

    @property
    def groups(self) -> dict[str, Options]:
        """The groups of options, by name."""
        return {
            "data": self.data,
            "model": self.model,
            "method_options": self.method_options,
            "optim": self.optim,
            "run": self.run,
        }


@functools.cache
def typed_config(method: str) -> type[RunConfig]:
    """`RunConfig` whose `method_options` have the type that `methods/METHOD.py` gives them, with its help text."""
    options = methods.load(method).Config
    made = dataclasses.make_dataclass(
        "RunConfig", [("method_options", options, field(default_factory=options))], bases=(RunConfig,), kw_only=True
    )
    made.__doc__ = RunConfig.__doc__
    for group in (Data, Model, options, Optim, Run):
        flowing(group)
    return made


def validate(config: RunConfig) -> None:
    """Raise UserError for values that make no sense, with the flag to change."""
    for group in config.groups.values():
        # The command line lets only these values through; a saved configuration may hold any.
        for name, hint in typing.get_type_hints(type(group)).items():
            value, known = vars(group)[name], typing.get_args(hint)
            literal = typing.get_origin(hint) is Literal
            need(not literal or value in known, f"{flag(name)} {value}: one of {', '.join(map(str, known))}")
        group.validate()
    sizes, epochs = config.data.size_schedule, config.optim.epochs
    need(
        len(sizes) <= epochs, f"--size-schedule has {len(sizes)} sizes for {epochs} epochs: an epoch for each at least"
    )


def refuse_unread(config: RunConfig, base: RunConfig, named: Set[str] = frozenset()) -> None:
    """Raise UserError for an option that is not read, though the user gave it: the command line has it (`named`), or it
    differs from `base`, where the user's changes began."""
    before, after = leaves(base), leaves(config)
    for name, condition in read_if(config).items():
        if (name in named or after[name] != before[name]) and not condition.holds(after):
            shown = _on_command_line(name, after[name])
            raise UserError(f"{shown} is not read here: it needs {condition.words}, or leave it out")


def leaves(config: RunConfig) -> dict[str, Any]:
    """Values of all options, by name."""
    return {name: value for group in config.groups.values() for name, value in vars(group).items()}


def read_if(config: RunConfig) -> dict[str, Condition]:
    """The conditions that the configuration's classes declare, by option."""
    return {name: when for group in config.groups.values() for name, when in conditions(type(group)).items()}


def _on_command_line(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return flag(name if value else f"no_{name}")
    return f"{flag(name)} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"


def sizes(config: RunConfig) -> tuple[int, ...]:
    """Sizes of the large views in the course of the run, px, each for the same share of its epochs."""
    return config.data.size_schedule or (config.data.size,)


def size_at(config: RunConfig, epoch: int) -> int:
    """Side of the large views in an epoch, px (`--size-schedule`)."""
    all_sizes = sizes(config)
    return all_sizes[min(epoch * len(all_sizes) // config.optim.epochs, len(all_sizes) - 1)]


def replace(config: RunConfig, **changes: Any) -> RunConfig:
    """A copy with options changed by name, in whichever group they are (`replace(c, epochs=5, dim=512)`)."""
    config = copy.copy(config)
    for name, group in config.groups.items():
        setattr(config, name, copy.copy(group))
    for name, value in changes.items():
        for part in (*config.groups.values(), config):
            if name in vars(part):
                setattr(part, name, value)
                break
        else:
            raise TypeError(f"the configuration of method {config.model.method} has no field {name!r}")
    return config


def with_method(config: RunConfig, method: str) -> RunConfig:
    """The same configuration under another method; what was changed in options that both have stays changed."""
    made = typed_config(method)(**vars(config) | {"method_options": methods.load(method).Config()})
    made.model = dataclasses.replace(config.model, method=method)
    defaults = vars(type(config.method_options)())
    for name, value in vars(config.method_options).items():
        if value != defaults[name] and name in vars(made.method_options):
            setattr(made.method_options, name, value)
    return made


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain nested values, for config.yaml and the checkpoint."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def from_dict(values: dict[str, Any], where: str) -> RunConfig:
    """The inverse of `to_dict`. Raises UserError, naming `where`, for fields that do not exist."""
    if not isinstance(values, dict) or "model" not in values:
        raise UserError(f"{where} is not the configuration of a run")
    config = typed_config(values["model"].get("method", ""))(preset=values.get("preset", ""))
    for name, group in config.groups.items():
        for key, value in values.get(name, {}).items():
            if key not in vars(group):
                near = difflib.get_close_matches(key, vars(group), n=1)
                raise UserError(f"{where} has an unknown field {name}.{key}" + (f", meant {near[0]}?" if near else ""))
            # YAML knows neither paths nor tuples.
            path = key == "out" and value is not None
            setattr(group, key, Path(value) if path else tuple(value) if isinstance(value, list) else value)
    return config


def save_yaml(config: RunConfig, path: Path) -> None:
    """Write config.yaml."""
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")


def load_yaml(path: Path) -> RunConfig:
    """Read config.yaml. Raises UserError if it is not one."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    return from_dict(values, str(path))
