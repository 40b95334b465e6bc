"""The typed configuration of a run. Every field is a command-line flag; `fastssl-train --help` is made from this file.

A run's configuration is `Config` plus the options of its method (`method_options`, the `Config` of methods/NAME.py), so
that a flag which the method does not read does not exist.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml

from fastssl import methods
from loaders.checks import flag
from loaders.errors import UserError


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
class Data:
    """Data and views"""

    data: str = ""
    """Training images: a .beton file made by fastssl-convert, or several (a.beton,b.beton or 'part-{00..15}.beton').
    Labels in them are never used for training."""
    val: str | None = None
    """Validation images (likewise): switches the kNN monitor on, with --data as its bank."""
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
    blur: float | None = None
    """Probability of Gaussian blur, sigma 0.1-2 px. None: the recipe's (0.5; 0 for cifar)."""
    batch_size: int = 32
    """Images per step, over all processes (each image is seen in all its views)."""
    backend: str = "auto"
    """Who decodes: auto (the best here, by measurement), cpu (libjpeg-turbo in threads), dali (on the GPU), ffcv,
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


@dataclass(kw_only=True)
class Model:
    """Network and method"""

    method: str = "fastsiam"
    """Name of a file in fastssl/methods."""
    backbone: str = "resnet50"
    """resnet18, resnet34, resnet50 (torchvision), the same with -cifar (3x3 stem, no max-pool), mobilenet_v2
    (torchvision), vit-t32, vit-t16, vit-s16 (class token as features) or timm/NAME."""
    zero_init_residual: bool = True
    """Start residual branches at zero (Goyal et al. 2017), as SimSiam's code does; ResNets only."""
    drop_path: float = 0.0
    """Probability that an image skips the last block in training, falling linearly to 0 at the first one: stochastic
    depth (SSLight's DINO with a ViT: .1). ViTs and models of timm; never in momentum targets."""
    bn_statistics: Literal["view", "joint"] = "view"
    """Whose statistics BatchNorm uses where a method encodes views one by one: each view's own (view), or those of all
    views of a size together (joint). SwAV and DINO are joint in any case."""
    sync_bn: bool = False
    """BatchNorm statistics over all processes (SimSiam section 3 uses it on 8 GPUs)."""
    activation_checkpointing: bool = False
    """Keep only the input of each of the backbone's blocks for the backward pass and compute the rest again: a fraction
    of the memory for a third to a half more time, with the same results."""


@dataclass(kw_only=True)
class Optim:
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
    """The batch size that --lr was tuned for, images. 0: --lr is used as it is, at any batch size."""
    momentum: float = 0.9
    """Of sgd and lars (adam's and adamw's betas are .9 and .999)."""
    weight_decay: float = 1e-4
    """Weight decay (SimSiam section 3; 5e-4 on CIFAR, appendix D)."""
    weight_decay_end: float | None = None
    """Weight decay at the end: a cosine from --weight-decay to it, changed at every step (DINO with a ViT: .04 to .4).
    None: constant."""
    no_decay: Literal["none", "1d", "1d+depthwise"] = "none"
    """What does not decay. none: everything does (SimSiam); 1d: not biases, norms and other parameters of one
    dimension, which lars does not adapt either (MoCo v3, DINO); 1d+depthwise: nor weights of depth-wise convolutions,
    which lars does adapt (SSLight)."""
    trust_coefficient: float = 0.001
    """lars: share of its own norm that a layer's weights may move by at rate 1 (eta)."""
    warmup_epochs: float = 0.0
    """Linear warm-up, epochs; its last step is at the full rate (SimSiam needs none)."""
    warmup_start: float = 0.0
    """Where warm-up begins, share of the rate (Fast-MoCo: .25, SwAV: .0625)."""
    schedule: Literal["epoch", "step", "constant"] = "epoch"
    """Cosine decay to --min-lr, changed once per epoch (SimSiam's code) or at every step (better for few epochs); or
    constant after warm-up (GSG on CIFAR)."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine, as it is: not scaled with the batch (SwAV, SSLight: .0048)."""
    clip_norm: float | None = None
    """Largest norm of the gradient of all parameters together (Fast-MoCo: 1). None: not clipped."""


@dataclass(kw_only=True)
class Run:
    """This run"""

    out: Path | None = None
    """Run folder. None: runs/NAME, NAME from the preset (or the method) and the data file."""
    seed: int = 0
    """Weights, order and views follow from it: same seed, same run."""
    resume: bool = False
    """Continue the run in --out where it stopped, in mid-epoch if need be, with the configuration that is there."""
    overwrite: bool = False
    """Throw away the run that --out holds."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda if there is one."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Of the network's products and activations; reductions and losses are in fp32 always. auto: bf16 where the device
    has it, fp16 with loss scaling on Turing GPUs, fp32 elsewhere."""
    compile: Literal["auto", "on", "off", "reduce-overhead"] = "auto"
    """torch.compile for the backbone, and for heads and loss as one graph. auto: on CUDA only (on a CPU it gains little
    and needs a compiler). reduce-overhead: with CUDA graphs, for small images and networks; takes more memory."""
    micro_batch: int | None = None
    """Images (of a process) that go through the network at a time: batches that are too large for the card. Losses and
    gradients are those of the whole batch, whatever the method, with BatchNorm over this many images. None: all."""
    plan: bool = False
    """Train nothing: measure the parts of this run for some seconds and say what it will cost (hours, memory, disk),
    here and on other cards."""
    fit: float | None = None
    """Hours that the run may take: --plan, and which epochs, views and sizes meet them."""
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
    """Votes weigh exp(cosine / T) (Wu et al. 2018)."""
    knn_bank: int = 50_000
    """Training images in the monitor's bank, at most."""
    recalibrate_bn: int = 0
    """Training images from which BatchNorm's statistics are recomputed, cropped and sized as for evaluation, for the
    monitor and for a second file of weights at the end, beside those of training, which are of random crops or tiles
    (10000 is plenty). 0: do not."""


@dataclass(kw_only=True)
class Config:
    """Pre-train an image backbone without labels on one GPU (or a CPU)."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    method_options: Any = None
    optim: Optim = field(default_factory=Optim)
    run: Run = field(default_factory=Run)
    preset: tyro.conf.Suppress[str] = ""

    def __post_init__(self) -> None:
        if self.method_options is None:
            self.method_options = methods.load(self.model.method).Config()


@functools.cache
def typed_config(method: str) -> type[Config]:
    """`Config` whose `method_options` have the type that `methods/METHOD.py` gives them, with its help text."""
    options = methods.load(method).Config
    made = dataclasses.make_dataclass(
        "Config",
        [("method_options", options, field(default_factory=options))],
        bases=(Config,),
        kw_only=True,
    )
    made.__doc__ = Config.__doc__
    return made


def validate(config: Config) -> None:
    """Raise UserError for values that make no sense, with the flag to change."""
    data, optim, run = config.data, config.optim, config.run

    def need(ok: bool, message: str) -> None:
        if not ok:
            raise UserError(message)

    need(bool(data.data), "no training data: give --data TRAIN.beton (made by fastssl-convert)")
    need(data.size >= 8, f"--size {data.size}: views need at least 8 px")
    need(
        not data.size_schedule or (data.size_schedule[-1] == data.size and min(data.size_schedule) >= 8),
        f"--size-schedule {':'.join(map(str, data.size_schedule))}: 8 px or more, the last one --size {data.size}",
    )
    need(
        len(data.size_schedule) <= optim.epochs,
        f"--size-schedule has {len(data.size_schedule)} sizes for {optim.epochs} epochs: an epoch for each at least",
    )
    need(data.batch_size >= 2, f"--batch-size {data.batch_size}: BatchNorm needs at least 2 images per step")
    need(data.prefetch >= 1, f"--prefetch {data.prefetch}: at least 1 batch has to be prepared")
    need(data.page_window >= 1, f"--page-window {data.page_window}: at least 1 page has to be shuffled")
    need(data.workers is None or data.workers >= 1, f"--workers {data.workers}: at least 1 thread has to decode")
    need(data.crop_min is None or 0 < data.crop_min <= 1, f"--crop-min {data.crop_min}: a share of the area, in (0, 1]")
    need(data.blur is None or 0 <= data.blur <= 1, f"--blur {data.blur}: a probability, in [0, 1]")
    need(optim.epochs >= 1, f"--epochs {optim.epochs}: at least 1")
    for name in ("optimizer", "no_decay", "schedule"):  # the command line checks them, a saved configuration does not
        given, known = getattr(optim, name), typing.get_args(typing.get_type_hints(Optim)[name])
        need(given in known, f"{flag(name)} {given}: one of {', '.join(known)}")
    need(optim.lr > 0, f"--lr {optim.lr}: must be positive")
    need(optim.lr_batch_size >= 0, f"--lr-batch-size {optim.lr_batch_size}: images, or 0 to use --lr as it is")
    need(0 <= optim.momentum < 1, f"--momentum {optim.momentum}: in [0, 1)")
    need(optim.weight_decay >= 0, f"--weight-decay {optim.weight_decay}: 0 or more")
    need(
        optim.weight_decay_end is None or optim.weight_decay_end >= 0,
        f"--weight-decay-end {optim.weight_decay_end}: 0 or more",
    )
    need(optim.trust_coefficient > 0, f"--trust-coefficient {optim.trust_coefficient}: must be positive")
    need(
        0 <= optim.warmup_epochs < optim.epochs,
        f"--warmup-epochs {optim.warmup_epochs}: from 0 to less than --epochs {optim.epochs} (a tenth of them, or 0)",
    )
    need(0 <= optim.warmup_start <= 1, f"--warmup-start {optim.warmup_start}: a share of the rate, in [0, 1]")
    need(optim.min_lr >= 0, f"--min-lr {optim.min_lr}: 0 or more")
    need(
        optim.min_lr == 0 or optim.schedule != "constant",
        f"--min-lr {optim.min_lr} is the end of a cosine, --schedule constant has none: use --schedule step",
    )
    need(optim.clip_norm is None or optim.clip_norm > 0, f"--clip-norm {optim.clip_norm}: must be positive")
    need(run.log_every >= 1, f"--log-every {run.log_every}: at least 1 step")
    need(run.checkpoint_minutes >= 0, f"--checkpoint-minutes {run.checkpoint_minutes}: 0 or more")
    need(run.knn_k >= 1 and run.knn_temperature > 0, "--knn-k must be at least 1 and --knn-temperature positive")
    need(run.recalibrate_bn == 0 or run.recalibrate_bn >= 2, f"--recalibrate-bn {run.recalibrate_bn}: 2 images or more")
    need(run.fit is None or run.fit > 0, f"--fit {run.fit}: hours, above 0")
    need(run.micro_batch is None or run.micro_batch >= 2, f"--micro-batch {run.micro_batch}: 2 images or more")
    need(run.max_steps is None or run.max_steps >= 1, f"--max-steps {run.max_steps}: at least 1")
    need(
        not (run.resume and run.overwrite),
        "--resume and --overwrite exclude each other: continue the run, or replace it",
    )
    config.method_options.validate()


def sizes(config: Config) -> tuple[int, ...]:
    """Sizes of the large views in the course of the run, px, each for the same share of its epochs."""
    return config.data.size_schedule or (config.data.size,)


def size_at(config: Config, epoch: int) -> int:
    """Side of the large views in an epoch, px (`--size-schedule`)."""
    all_sizes = sizes(config)
    return all_sizes[min(epoch * len(all_sizes) // config.optim.epochs, len(all_sizes) - 1)]


def replace(config: Config, **changes: Any) -> Config:
    """A copy with leaf fields changed by name, wherever they are (`replace(c, epochs=5, dim=512)`)."""
    config = _copy(config)
    for name, value in changes.items():
        for group in (config.data, config.model, config.method_options, config.optim, config.run, config):
            if name in {f.name for f in dataclasses.fields(group)}:
                setattr(group, name, value)
                break
        else:
            raise TypeError(f"the configuration of method {config.model.method} has no field {name!r}")
    return config


def with_method(config: Config, method: str) -> Config:
    """The same configuration under another method; what was changed in options that both have stays changed."""
    made = typed_config(method)
    options, before = methods.load(method).Config(), type(config.method_options)()
    for f in dataclasses.fields(options):
        if hasattr(before, f.name) and getattr(config.method_options, f.name) != getattr(before, f.name):
            setattr(options, f.name, getattr(config.method_options, f.name))
    model = dataclasses.replace(config.model, method=method)
    return made(
        data=config.data, model=model, method_options=options, optim=config.optim, run=config.run, preset=config.preset
    )


def _copy(config: Config) -> Config:
    groups = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return type(config)(**{k: dataclasses.replace(v) if dataclasses.is_dataclass(v) else v for k, v in groups.items()})


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested values, for config.yaml and the checkpoint."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def from_dict(values: dict[str, Any], where: str) -> Config:
    """The inverse of `to_dict`. Raises UserError, naming `where`, for fields that do not exist."""
    if not isinstance(values, dict) or "model" not in values:
        raise UserError(f"{where} is not the configuration of a run")
    options = methods.load(values["model"].get("method", "")).Config
    types = {"data": Data, "model": Model, "method_options": options, "optim": Optim, "run": Run}
    made = {}
    for name, group in types.items():
        given = values.get(name, {})
        hints = typing.get_type_hints(group)
        for key in given:
            if key not in hints:
                near = difflib.get_close_matches(key, hints, n=1)
                raise UserError(f"{where} has an unknown field {name}.{key}" + (f", meant {near[0]}?" if near else ""))
        # YAML knows neither paths nor tuples.
        made[name] = group(
            **{
                k: Path(v) if k == "out" and v is not None else tuple(v) if isinstance(v, list) else v
                for k, v in given.items()
            }
        )
    return typed_config(made["model"].method)(preset=values.get("preset", ""), **made)


def save_yaml(config: Config, path: Path) -> None:
    """Write config.yaml."""
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")


def load_yaml(path: Path) -> Config:
    """Read config.yaml. Raises UserError if it is not one."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    return from_dict(values, str(path))
