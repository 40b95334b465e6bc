"""One training step: the gain of each measure, where its time and memory go, and its share of the device's own rates.

    python -m benchmarks.step [--backbones resnet50 resnet18] [--method fastsiam] [--batch-size 32] [--size 224]
    python -m benchmarks.step --backbones resnet50 --only amp compiled lightly --json step.json

All contestants of a backbone train on the same views, which lie on the device already, in interleaved rounds:

    eager             fp32, NCHW, one view after another through the network: the loss in plain torch, no compiler
    channels-last     the same in memory format channels_last
    amp               and in mixed precision (--precision)
    one-pass          and all views in one pass: this project's `fastssl.training.step.Step` with --compile off
    compiled          the same with --compile on: the trainer's default on a GPU
    reduce-overhead   the same with --compile reduce-overhead (CUDA graphs; GPU only)
    lightly, lightly-amp, simsiam     the steps of others: see benchmarks/peers.py
    copy, matmul-fp32, matmul-amp     the device itself: a large copy, a large matrix product

Optimiser (fused SGD), heads and weights at the start are the same in the first six. `ours` is `compiled` on a GPU,
`one-pass` on a CPU. `x ours` compares times per view, as SimSiam has two views of an image and FastSiam --num-views.

Time on a GPU is the GPU's own, between events; on a CPU it is the CPU time of one thread. Parts (backbone, rest of the
forward pass, backward pass, optimiser with momentum networks) are timed in separate steps by events in the stream, so
that nothing waits for a measurement.

    GB saved     kept between forward and backward pass, the weights left out (`fastssl.training.memory.Activations`)
    GB peak      GPU only: weights, optimiser, views and the most that was allocated within the step
    GB moved     read and written by the step's operations if no cache helps; for eager contestants only, as the inside
                 of fused operations cannot be seen. GB/s follows, and its share of the device's own copy.
    TFLOP/s      operations of the step (of the same step without compiler for compiled ones) per second, and their
                 share of the device's own product. `fastssl.planning.cost.Meter` counts both.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from benchmarks import common
from benchmarks.augment import COPY_BYTES
from benchmarks.common import Report, chosen, figure, interleave, ratio, shown, spread, synchronize, timed_on
from benchmarks.peers import PEERS, TrainStep
from fastssl.config import schema as configs
from fastssl.device import pick_device, pick_precision
from fastssl.planning.cost import Meter
from fastssl.progress import Progress
from fastssl.training.build import make_method, make_views, place
from fastssl.training.memory import Activations
from fastssl.training.step import Step
from loaders import Batch, Loader, ViewSpec
from loaders.dataset import open_data
from loaders.errors import UserError

PARTS = ("backbone", "rest of forward", "backward", "optimiser")
GPU_STEPS = 20  # in a round, so that launching the first one does not show
MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}
COPIES = {"cpu": 4, "cuda": 20}
LR = 1e-4  # too small to change anything, however often the same views are trained on
GB = 1e9


@dataclass(kw_only=True)
class StepOptions:
    """Options."""

    data: Path | None = None
    """Views of these images (.beton). None: random numbers."""
    backbones: tuple[str, ...] = ("resnet18", "resnet34", "resnet50", "mobilenet_v2", "vit-s16")
    """Networks to measure, one after the other."""
    method: Literal["fastsiam", "simsiam"] = "fastsiam"
    """The method to train: one of the two whose plain form is written out here."""
    num_views: int = 4
    """K of fastsiam."""
    batch_size: int = 32
    """Images per step."""
    size: int = 224
    """Side of the views, px."""
    repeats: int = 5
    """Rounds that count; one more comes before them."""
    steps: int | None = None
    """Steps per round. None: 20 on a GPU, 1 on a CPU."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Precision of the contestants in mixed precision, as for fastssl-train."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda if there is one."""
    only: tuple[str, ...] = ()
    """Measure these contestants only."""
    skip: tuple[str, ...] = ()
    """Leave these contestants out."""
    card_gb: float | None = None
    """Say whether all that the process holds on the card fits in so many GB; for one backbone and one contestant."""
    json: Path | None = None
    """Write every single measurement to this file."""

    def check(self) -> None:
        """Raise UserError for values that make no sense."""
        for name, least in {"batch_size": 2, "size": 8, "repeats": 1, "num_views": 2}.items():
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give {least} or more")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"--steps is {self.steps}: give 1 or more")
        if not self.backbones:
            raise UserError("--backbones needs at least one name")
        if self.card_gb is not None and not len(self.backbones) == len(self.only) == 1:
            raise UserError("--card-gb is of one network trained in one way: give one of --backbones and one in --only")
        if self.card_gb is not None and pick_device(self.device).type == "cpu":
            raise UserError("--card-gb: there is no card; leave it out, or use --device cuda")


@dataclass(frozen=True)
class Variant:
    """Settings in which this project's contestants differ."""

    channels_last: bool = True
    amp: bool = True
    one_pass: bool = True
    compile: Literal["off", "on", "reduce-overhead"] = "off"

    def missing(self, config: StepOptions, device: torch.device) -> str | None:
        """Why this variant cannot run, or would repeat another one; None if it can."""
        if self.compile == "reduce-overhead" and device.type == "cpu":
            return "CUDA graphs need a GPU"
        if self.compile != "off" and device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
            return "no C++ compiler: install g++"
        if not self.one_pass and self.amp and pick_precision(config.precision, device).dtype is None:
            return "mixed precision is off: --precision fp32, or a CPU without bf16"
        return None


VARIANTS = {
    "eager": Variant(channels_last=False, amp=False, one_pass=False),
    "channels-last": Variant(amp=False, one_pass=False),
    "amp": Variant(one_pass=False),
    "one-pass": Variant(),
    "compiled": Variant(compile="on"),
    "reduce-overhead": Variant(compile="reduce-overhead"),
}
RATES = ("copy", "matmul-fp32", "matmul-amp")


# --- Contestants ------------------------------------------------------------------------------------------------------


@dataclass
class StepContestant:
    """A training step on views of its own type and format."""

    take: TrainStep
    views: list[Tensor]
    weights: list[Tensor]
    dtype: torch.dtype | None  # of products; None: fp32
    timer: PartTimer | None = None  # where parts can be told apart
    plain: Callable[[], StepContestant] | None = None  # for compiled steps: makes the same step without compiler
    graphs: bool = False  # CUDA graphs own the memory that is kept, and nothing else may hold it
    parts_ms: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PARTS})

    def __call__(self) -> None:
        self.take(self.views)

    def round(self, steps: int, _number: int) -> None:
        """So many steps."""
        for _ in range(steps):
            self()

    def measure_parts(self, _number: int) -> None:
        """A step, whose parts' times are added to `parts_ms`."""
        for part, ms in self.timer.measure(self).items():
            self.parts_ms[part].append(ms)


def train_config(config: StepOptions, backbone: str, variant: Variant) -> configs.RunConfig:
    """The configuration of a run that takes these steps."""
    made = configs.typed_config(config.method)()
    made.model.method = config.method
    changes = {"backbone": backbone, "size": config.size, "batch_size": config.batch_size, "lr": LR}
    changes |= {"precision": config.precision if variant.amp else "fp32", "compile": variant.compile}
    if config.method == "fastsiam":
        changes["num_views"] = config.num_views
    return configs.replace(made, **changes)


def ours(
    config: StepOptions, backbone: str, variant: Variant, views: Sequence[Tensor], device: torch.device
) -> StepContestant:
    """This project's step in one of its variants."""
    options = train_config(config, backbone, variant)
    step = Step(options, place(make_method(options), device), device, pick_precision(options.run.precision, device))
    method = step.method
    memory_format = torch.channels_last if variant.channels_last else torch.contiguous_format
    if not variant.channels_last:
        method.to(memory_format=memory_format)
        for state in step.optimizer.state.values():
            state.update({name: value.contiguous() for name, value in state.items() if isinstance(value, Tensor)})
    if not variant.one_pass:
        method.forward = MethodType(separate_views, method)
    index = torch.arange(config.batch_size)
    progress = Progress(0, 1000, 100)

    def take(views: Sequence[Tensor]) -> None:
        step(Batch(list(views), None, index, index), progress)

    dtype = step.precision.dtype  # the loader hands out views of this type
    own_views = [view.to(dtype or torch.float32).contiguous(memory_format=memory_format) for view in views]
    plain = None
    if variant.compile != "off":
        plain = functools.partial(ours, config, backbone, dataclasses.replace(variant, compile="off"), views, device)
    return StepContestant(
        take, own_views, list(method.parameters()), dtype, PartTimer(step), plain, variant.compile == "reduce-overhead"
    )


def separate_views(method: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The plain form of FastSiam's loss (with two views SimSiam's): view by view, with torch's own functions."""
    z = [method.projector(method.backbone(x)) for x in batch.views]
    loss = torch.zeros((), device=z[0].device)
    for i, z_BD in enumerate(z):
        target_BD = torch.stack([other for j, other in enumerate(z) if j != i]).detach().float().mean(0)
        loss = loss - F.cosine_similarity(method.predictor(z_BD).float(), target_BD, dim=-1).mean() / len(z)
    return loss, {}


def peer(
    config: StepOptions, backbone: str, name: str, views: Sequence[Tensor], device: torch.device
) -> StepContestant:
    """A peer's step."""
    step = PEERS[name].step(name=backbone, size=config.size, device=device)
    own_views = [view.float().contiguous() for view in views[: PEERS[name].num_views(len(views))]]
    return StepContestant(step, own_views, list(step.net.parameters()), step.precision.dtype)


def make(
    config: StepOptions, backbone: str, name: str, views: Sequence[Tensor], device: torch.device
) -> StepContestant:
    """The contestant called `name`."""
    if name in VARIANTS:
        return ours(config, backbone, VARIANTS[name], views, device)
    return peer(config, backbone, name, views, device)


def make_views_on(config: StepOptions, spec: ViewSpec, device: torch.device) -> list[Tensor]:
    """K views [B, 3, S, S] of the file's first images, or random numbers without a file."""
    if config.data is None:
        generator = torch.Generator().manual_seed(0)
        shape = config.batch_size, 3, config.size, config.size
        return [torch.randn(shape, generator=generator).to(device) for _ in range(spec.K)]
    options = {"batch_size": config.batch_size, "device": "cpu", "backend": "cpu"}
    with Loader(open_data(str(config.data)), spec, **options) as loader:
        batches = loader.epoch(0)
        views = [view.to(device, copy=True) for view in next(batches).views]
        batches.close()
    return views


# --- Parts ------------------------------------------------------------------------------------------------------------


class PartTimer:
    """The times of a step's parts: stamps where parts meet, taken while `stamps` is a dictionary.

    The network is wrapped after it was compiled, so no stamp is part of a graph.
    """

    def __init__(self, step: Step):
        self.cuda = step.device.type == "cuda"
        self.stamps: dict[str, Any] | None = None
        self.calls: list[tuple[Any, Any]] = []  # of the backbone: begin, end
        method = step.method
        method.backbone = _Timed(method.backbone, self)
        method.register_forward_pre_hook(lambda *_: self.stamp("forward"))
        method.register_forward_hook(lambda *_: self.stamp("backward"))
        rest = method.after_backward

        def after_backward(progress: Progress) -> None:
            self.stamp("optimiser")
            rest(progress)

        method.after_backward = after_backward

    def now(self) -> Any:
        """An event in the GPU's stream, or the CPU time of this process, seconds."""
        if not self.cuda:
            return common.cpu_seconds()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stamp(self, name: str) -> None:
        if self.stamps is not None:
            self.stamps[name] = self.now()

    def ms(self, begin: Any, end: Any) -> float:
        """Milliseconds between two stamps."""
        return begin.elapsed_time(end) if self.cuda else 1000 * (end - begin)

    def measure(self, take: Callable[[], object]) -> dict[str, float]:
        """Milliseconds of each part of one step."""
        self.stamps, self.calls = {}, []
        self.stamp("begin")
        take()
        self.stamp("end")
        synchronize()
        s, self.stamps = self.stamps, None
        backbone = sum(self.ms(*call) for call in self.calls)
        return {
            "backbone": backbone,
            "rest of forward": self.ms(s["forward"], s["backward"]) - backbone,
            "backward": self.ms(s["backward"], s["optimiser"]),
            "optimiser": self.ms(s["begin"], s["forward"]) + self.ms(s["optimiser"], s["end"]),
        }


class _Timed(nn.Module):
    """A network whose calls a timer times."""

    def __init__(self, net: nn.Module, timer: PartTimer):
        super().__init__()
        self.net, self.timer = net, timer

    def forward(self, x: Tensor) -> Tensor:
        if self.timer.stamps is None:
            return self.net(x)
        begin = self.timer.now()
        out = self.net(x)
        self.timer.calls.append((begin, self.timer.now()))
        return out


# --- Memory and traffic -----------------------------------------------------------------------------------------------


def saved_bytes(contestant: StepContestant) -> int:
    """Bytes that one step keeps for its backward pass, weights left out."""
    with (kept := Activations(contestant.weights)):
        contestant()
    return kept.peak


def metered(contestant: StepContestant) -> Meter:
    """The operations and the traffic of one eager step."""
    with Meter() as meter:
        contestant()
    return meter


def peak_bytes(contestant: StepContestant) -> int | None:
    """GPU only: the most bytes that this contestant alone would have needed."""
    device = contestant.views[0].device
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    contestant()
    torch.cuda.synchronize(device)
    weights = 2 * sum(w.nbytes for w in contestant.weights)  # with their momentum
    return torch.cuda.max_memory_allocated(device) - before + weights + sum(v.nbytes for v in contestant.views)


def card_bytes(device: torch.device) -> int | None:
    """GPU only: bytes in use on the card by all programs, with CUDA's own and what the allocator keeps."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total - free


# --- The device -------------------------------------------------------------------------------------------------------


def copy(device: torch.device) -> tuple[Callable[[int], object], float]:
    """A round of large copies, and the bytes that it moves."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target, num = torch.empty_like(source), COPIES[device.type]
    return lambda _number: [target.copy_(source) for _ in range(num)], 2.0 * num * source.nbytes


def matmul(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Callable[[int], object], float]:
    """A round of large matrix products, and its floating-point operations."""
    side, num = MATMUL_SIDE[device.type], COPIES[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda _number: [torch.mm(a, b, out=out) for _ in range(num)], 2.0 * num * side**3


# --- The command ------------------------------------------------------------------------------------------------------


def measure(config: StepOptions) -> Report:
    """One training step: the gain of each measure, its parts, memory and traffic, and the steps of others."""
    device = pick_device(config.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    amp = pick_precision(config.precision, device).dtype
    missing = {name: variant.missing(config, device) for name, variant in VARIANTS.items()}
    missing |= {name: p.missing() for name, p in PEERS.items()}
    missing["lightly-amp"] = missing["lightly-amp"] or missing["amp"]
    missing["matmul-amp"] = None if amp else missing["amp"]
    names = chosen((*VARIANTS, *PEERS, *RATES), config)
    skipped = {name: missing[name] for name in names if missing.get(name)}
    names = [name for name in names if name not in skipped]
    trained = [name for name in names if name not in RATES]
    if not trained:
        raise UserError("nobody is left to be measured: see --only and --skip")
    makers = {"copy": copy, "matmul-fp32": matmul, "matmul-amp": functools.partial(matmul, dtype=amp)}
    work = {name: make(device) for name, make in makers.items() if name in names}
    report = Report([], [], skipped)
    for backbone in config.backbones:
        rows = measure_backbone(config, backbone, trained, work, device, skipped)
        report.rows += rows
        if not rows:
            continue
        report.tables += [*tables(config, backbone, device, rows), *aims(backbone, device, rows)]
        if config.card_gb is not None:
            what = f"{backbone} {trained[0]} in {rows[0]['precision']}, batch {config.batch_size}: GB held on the card"
            report.tables.append(verdict(what, rows[0]["card_gb"], config.card_gb, at_most=True))
    return report


def measure_backbone(
    config: StepOptions,
    backbone: str,
    names: Iterable[str],
    work: dict[str, tuple[Callable, float]],
    device: torch.device,
    skipped: dict[str, str],
) -> list[dict[str, Any]]:
    """The rows of one backbone: contestants and the device's own rates. Adds to `skipped` who cannot run."""
    torch.compiler.reset()
    gc.collect()  # the contestants of another backbone, which hold each other
    views = make_views_on(config, make_views(train_config(config, backbone, VARIANTS["eager"])), device)
    who = {}
    for name in names:
        try:
            who[name] = make(config, backbone, name, views, device)
            who[name]()
        except RuntimeError as error:  # out of memory, or a compiler that fails: the others go on
            who.pop(name, None)
            gc.collect()
            skipped[f"{name} of {backbone}"] = str(error).strip().partition("\n")[0]
    if not who:
        return []
    steps = config.steps or (GPU_STEPS if device.type == "cuda" else 1)
    rounds = {name: timed_on(device, functools.partial(c.round, steps)) for name, c in who.items()}
    rounds |= {name: timed_on(device, function) for name, (function, _) in work.items()}
    runs = interleave(rounds, config.repeats)
    card = card_bytes(device)
    seconds = {n: [r.elapsed_s if device.type == "cuda" else r.cpu_s for r in found] for n, found in runs.items()}
    rates = {name: figure([amount / s for s in seconds[name]]) for name, (_, amount) in work.items()}
    interleave({n: timed_on(device, c.measure_parts) for n, c in who.items() if c.timer}, config.repeats, warm=True)
    rows = []
    for name, c in who.items():
        s = [value / steps for value in seconds[name]]
        rows.append(
            {"backbone": backbone, "contestant": name, **row(config, c, s, rates), "card_gb": card and card / GB}
        )
    add_ratios(rows, default_of(device))
    return [*rows, *({"backbone": backbone, "contestant": name, "per_s": rate} for name, rate in rates.items())]


def default_of(device: torch.device) -> str:
    """The contestant that trains as fastssl-train does on this device."""
    return "compiled" if device.type == "cuda" else "one-pass"


def row(config: StepOptions, c: StepContestant, seconds: list[float], rates: dict[str, dict]) -> dict[str, Any]:
    """The figures of one contestant, whose steps took `seconds` each."""
    meter, peak = metered(c.plain() if c.plain else c), peak_bytes(c)
    moved = None if c.plain else meter.bytes
    copied, product = rates.get("copy"), rates.get("matmul-amp" if c.dtype else "matmul-fp32")
    return {
        "precision": str(c.dtype or torch.float32).removeprefix("torch."),
        "num_views": len(c.views),
        "ms_per_step": figure([1000 * s for s in seconds]),
        "ms_per_view": figure([1000 * s / len(c.views) / config.batch_size for s in seconds]),
        "parts_ms": {part: figure(values) for part, values in c.parts_ms.items()} if c.timer else None,
        "saved_gb": None if c.graphs else saved_bytes(c) / GB,
        "peak_gb": peak and peak / GB,
        "moved_gb": moved and moved / GB,
        "tflop": meter.flops / 1e12,
        "gb_per_s": figure([moved / s / GB for s in seconds]) if moved else None,
        "tflop_per_s": figure([meter.flops / s / 1e12 for s in seconds]),
        "of_copy": figure([moved / s / copied["median"] for s in seconds]) if moved and copied else None,
        "of_matmul": figure([meter.flops / s / product["median"] for s in seconds]) if product else None,
    }


def add_ratios(rows: list[dict[str, Any]], default: str) -> None:
    """Add `over_ours`: times per view over those of `default`, round by round; None if it was not measured."""
    values = {r["contestant"]: r["ms_per_view"]["values"] for r in rows}
    for r in rows:
        r["over_ours"] = ratio(r["ms_per_view"]["values"], values[default]) if default in values else None


def tables(config: StepOptions, backbone: str, device: torch.device, rows: Sequence[dict[str, Any]]) -> list[Table]:
    """The rows of one backbone as tables: times, and memory and rates."""
    rates = {r["contestant"]: r["per_s"]["median"] for r in rows if "per_s" in r}
    device_does = [
        f"{name} {shown(rate / (GB if name == 'copy' else 1e12))} {'GB/s' if name == 'copy' else 'TFLOP/s'}"
        for name, rate in rates.items()
    ]
    title = f"{backbone}, {config.method}, {config.batch_size} images of {config.size} px, {device.type}: ms per step"
    times = Table(title=title, title_justify="left")
    amounts = Table(title=", ".join(["memory and rates", *device_does]), title_justify="left")
    for column in ("contestant", "views", "ms/step", "min-max", "ms/view", "x ours", "min-max", *PARTS):
        times.add_column(column, justify="left" if column == "contestant" else "right")
    columns = ("contestant", "GB saved", "GB peak", "GB moved", "GB/s", "% of copy", "TFLOP/s", "% of matmul")
    for column in columns:
        amounts.add_column(column, justify="left" if column == "contestant" else "right")
    for r in (r for r in rows if "per_s" not in r):
        name, over, parts = r["contestant"], r["over_ours"], r["parts_ms"] or {}
        measured = shown(r["ms_per_step"]), spread(r["ms_per_step"]), shown(r["ms_per_view"])
        compared = shown(over), spread(over) if over else "-"
        times.add_row(name, str(r["num_views"]), *measured, *compared, *(shown(parts.get(part)) for part in PARTS))
        gb = (shown(r[key]) for key in ("saved_gb", "peak_gb", "moved_gb", "gb_per_s"))
        shares = (shown(r[key] and 100 * r[key]["median"], 2) for key in ("of_copy", "of_matmul"))
        amounts.add_row(name, *gb, next(shares), shown(r["tflop_per_s"]), next(shares))
    return [times, amounts]


def aims(backbone: str, device: torch.device, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines about this project's aims: a compiled step on a GPU, a step no slower than eager on a CPU."""
    default, least = default_of(device), 1.3 if device.type == "cuda" else 1.0
    eager = next((r for r in rows if r["contestant"] == "amp"), None)
    if eager is None or eager["over_ours"] is None:
        return []
    return [verdict(f"{backbone} {default}, times the speed of amp", eager["over_ours"]["median"], least)]


def verdict(what: str, value: float, bound: float, *, at_most: bool = False) -> str:
    """A line about an aim: what was measured, the aim, pass or FAIL. `benchmarks.gpu_suite` collects them."""
    met = value <= bound if at_most else value >= bound
    return f"aim: {what}: {shown(value)}, wanted {'<=' if at_most else '>='} {bound:g}: {'pass' if met else 'FAIL'}"


if __name__ == "__main__":
    sys.exit(common.main("step", StepOptions, measure))
