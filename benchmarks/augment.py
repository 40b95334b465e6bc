"""The cost of augmentation: every operation alone and whole recipes, ours and the peers, against the memory's speed.

    python -m benchmarks.augment --data TRAIN.beton [--device cuda] [--num-views 4] [--size 224] [--json FILE]
    python -m benchmarks.augment --data TRAIN.beton --workloads blur simsiam --only copy rows kornia

Every contestant turns the same uint8 crops of real images, which lie on the device already, into normalised views.

    copy              the device copies a large buffer: the roofline. The time shown is what the bytes that a fused
                      pass has to move at least, one read and one number of --dtype written per pixel and channel,
                      would take at that rate.
    rows              ours on the CPU (`augment_rows`), one core, image by image
    device            ours on a GPU as the loader calls it (`DeviceAugment`): parameters packed, sent, and used by the
                      compiled batch form
    kernel            ours on a GPU, the compiled batch form alone, its parameters being there
    kornia            kornia.augmentation, a draw per image, on float32; pip install kornia
    torchvision-v2    transforms.v2 on batches of float32. It draws once per batch, so each operation is given its
                      share of the batch (jitter 80 % of the images, ...): less than a draw per image would cost.

On a CPU both peers get their batches in pieces of 2.4 MB of floats (4 images of 224 px), which stay in cache: up to
1.6 times faster than the whole batch of 32, and faster than single images.

Operations run on every image (p = 1); recipes are `simsiam`, `byol-second` (solarize), `dino-local` (96 px) and
`cifar` (32 px). Time is CPU time of one core with --device cpu, else the GPU's own time between events, where a round
is 20 times --images, so that neither is it too short nor do its crops fit into a cache. `x ours` is over `rows`, on a
GPU over `device`.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Literal

import numpy as np
import torch
from rich.table import Table

from benchmarks import common
from benchmarks.common import Report, Run, chosen, figure, interleave, not_installed, ratio, spread, table, timed_on
from benchmarks.contestants import ours
from loaders import views
from loaders.augment import DeviceAugment, augment, augment_rows, operations, to_tensors
from loaders.draw import Draws, draw
from loaders.errors import UserError, unknown
from loaders.views import View, ViewSpec

MEAN, STD = views.IMAGENET_MEAN, views.IMAGENET_STD
CACHE_BYTES = 512 << 20  # crops beyond that are taken again: ten times the second-level cache of an H200
COPY_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
PIECE_FLOATS = 4 * 3 * 224**2
GPU_FACTOR = 20  # so many times --images on a GPU

Function = Callable[[int], object]  # the number of the round -> nothing of interest


@dataclass(kw_only=True)
class AugmentOptions(common.CommonOptions):
    """Options."""

    images: int = 64
    """Images per round; on a GPU 20 times as many."""
    workloads: tuple[str, ...] = ()
    """Operations and recipes to measure; all unless given."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Number format of the views; auto: float32 on a CPU, float16 on a GPU."""


def workloads(size: int) -> dict[str, View]:
    """Views to measure: operations alone in views of `size` px, and recipes."""
    strength = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
    single = {name: View(size, jitter_p=1, **{name: value}) for name, value in strength.items()}
    return {
        **single,
        "jitter": View(size, jitter_p=1, **strength),
        "gray": View(size, gray_p=1),
        "blur": View(size, blur_p=1),
        "solarize": View(size, solarize_p=1),
        "normalise": View(size),
        "simsiam": views.simsiam(1, size).views[0],
        "byol-second": views.byol(size).views[1],
        "dino-local": views.multicrop(size).views[-1],
        "cifar": views.cifar().views[0],
    }


@dataclass
class Work:
    """One workload: steps of K crops [B, 3, S, S] each, on the device, and K draws for each step."""

    view: View
    device: torch.device
    dtype: torch.dtype
    crops: list[list[torch.Tensor]]
    draws: list[list[Draws]]
    num_steps: int  # of a round

    @property
    def num_views(self) -> int:
        return self.num_steps * sum(map(len, self.crops[0]))

    @property
    def bytes_per_view(self) -> int:
        """Bytes that any implementation has to read and write per view."""
        return 3 * self.view.size**2 * (1 + self.dtype.itemsize)

    def pieces(self, crop_B3SS: torch.Tensor) -> Sequence[torch.Tensor]:
        """The batch in pieces, as the peers get it."""
        return crop_B3SS.split(max(1, PIECE_FLOATS // (3 * self.view.size**2))) if self.on_cpu else [crop_B3SS]

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    @property
    def num_copies(self) -> int:
        """Copies of the large buffer that move as many bytes as a round has to move, or somewhat more."""
        return -(-self.num_views * self.bytes_per_view // (2 * COPY_BYTES[self.device.type]))

    def through(self, step: Callable[[list[torch.Tensor], list[Draws]], list[torch.Tensor]]) -> Function:
        """A round that gives each step to a function, which returns the views (whole or in pieces)."""

        def round_(_number: int) -> None:
            for crops, draws in islice(cycle(zip(self.crops, self.draws, strict=True)), self.num_steps):
                step(crops, draws)

        return round_


def make_work(config: AugmentOptions, view: View, crops: Sequence[list[torch.Tensor]]) -> Work:
    """The crops on the device, with draws of their own."""
    device = torch.device(config.device)
    K, B, S = len(crops[0]), config.batch_size, view.size
    spec = ViewSpec((view,) * K)
    ids = np.arange(B)
    sides = {"height_B": np.full(B, S), "width_B": np.full(B, S)}
    draws = [draw(spec, seed=0, epoch=step, index_B=ids, **sides) for step in range(len(crops))]
    dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[config.dtype]
    on_device = [[c.to(device, memory_format=torch.channels_last) for c in step] for step in crops]
    return Work(view, device, dtype, on_device, draws, _num_images(config) // B)


def _num_images(config: AugmentOptions) -> int:
    return config.images * (GPU_FACTOR if torch.device(config.device).type == "cuda" else 1)


def real_crops(config: AugmentOptions, size: int, num_views: int) -> list[list[torch.Tensor]]:
    """Steps of K uint8 crops of the file's images, on the host, as the loader makes them; not more than CACHE_BYTES."""
    steps = max(1, CACHE_BYTES // (3 * size**2 * config.batch_size * num_views))
    images = min(steps, _num_images(config) // config.batch_size) * config.batch_size
    options = dataclasses.replace(config, device="cpu", images=images, size=size)
    return [[c.clone() for c in crops] for crops in ours("cpu", "crops", options, num_views, 1)(0)]


# --- Contestants ------------------------------------------------------------------------------------------------------


def copy(work: Work) -> Function:
    """The large buffer, copied."""
    source = torch.ones(COPY_BYTES[work.device.type], dtype=torch.uint8, device=work.device)
    target = torch.empty_like(source)

    def round_(_number: int) -> None:
        for _ in range(work.num_copies):
            target.copy_(source)

    return round_


def rows(work: Work) -> Function:
    """Our form for the CPU."""
    outs = [torch.empty_like(crop, dtype=work.dtype) for crop in work.crops[0]]

    def step(crops: list[torch.Tensor], draws: list[Draws]) -> list[torch.Tensor]:
        for crop, drawn, out in zip(crops, draws, outs, strict=True):
            augment_rows(crop, operations(drawn, work.view), work.view, MEAN, STD, range(len(crop)), out)
        return outs

    return work.through(step)


def device(work: Work) -> Function:
    """Our form for a GPU, called as the loader calls it."""
    augment_all = DeviceAugment(ViewSpec((work.view,) * len(work.crops[0])), work.device, work.dtype)
    return work.through(lambda crops, draws: augment_all(crops, draws)[0])


def kernel(work: Work) -> Function:
    """Our form for a GPU without the host's part."""
    params = {id(d): to_tensors(d, work.view, work.device) for draws in work.draws for d in draws}
    function = functools.partial(augment, view=work.view, mean=MEAN, std=STD, dtype=work.dtype)
    compiled = torch.compile(function, fullgraph=True, dynamic=False)

    def step(crops: list[torch.Tensor], draws: list[Draws]) -> list[torch.Tensor]:
        return [compiled(crop, params[id(drawn)])[0] for crop, drawn in zip(crops, draws, strict=True)]

    return work.through(step)


def kornia(work: Work) -> Function:
    """kornia's operations in one torch.nn.Sequential."""
    import kornia.augmentation as k

    view, ops = work.view, []
    strengths = [view.brightness, view.contrast, view.saturation, view.hue]
    if view.jitter_p and sum(s > 0 for s in strengths) > 1:
        ops.append(k.ColorJitter(*strengths, p=view.jitter_p))
    elif view.jitter_p:  # its operations alone are cheaper than its ColorJitter with one strength
        single = (k.RandomBrightness, k.RandomContrast, k.RandomSaturation, k.RandomHue)
        middle = (1, 1, 1, 0)
        ops += [op((m - s, m + s), p=view.jitter_p) for op, s, m in zip(single, strengths, middle, strict=True) if s]
    if view.gray_p:
        ops.append(k.RandomGrayscale(p=view.gray_p))
    if view.blur_p:
        ops.append(k.RandomGaussianBlur(2 * (2 * view.blur_radius + 1,), view.blur_sigma, p=view.blur_p))
    if view.solarize_p:
        ops.append(k.RandomSolarize((0.5, 0.5), (0.0, 0.0), p=view.solarize_p))
    if view.flip_p:
        ops.append(k.RandomHorizontalFlip(p=view.flip_p))
    chain = torch.nn.Sequential(*ops, k.Normalize(MEAN, STD)).to(work.device)

    def step(crops: list[torch.Tensor], _draws: list[Draws]) -> list[torch.Tensor]:
        return [chain(piece.float() / 255).to(work.dtype) for crop in crops for piece in work.pieces(crop)]

    return work.through(step)


def torchvision_v2(work: Work) -> Function:
    """transforms.v2, each operation on its share of the batch."""
    from torchvision.transforms import v2 as t

    view = work.view
    ops = [
        (view.jitter_p, t.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)),
        (view.gray_p, t.Grayscale(3)),
        (view.blur_p, t.GaussianBlur(2 * view.blur_radius + 1, view.blur_sigma)),
        (view.solarize_p, t.RandomSolarize(0.5, p=1)),
        (view.flip_p, t.RandomHorizontalFlip(1)),
    ]
    to_float, normalise = t.ToDtype(torch.float32, scale=True), t.Normalize(MEAN, STD)

    def augmented(crop: torch.Tensor) -> Iterator[torch.Tensor]:
        end = 0
        for piece in work.pieces(crop):
            start, end = end, end + len(piece)
            x = to_float(piece)
            for share, op in ops:
                num = round(share * end) - round(share * start)
                if num == len(x):
                    x = op(x)
                elif num:
                    x[:num] = op(x[:num])
            yield normalise(x).to(work.dtype)

    def step(crops: list[torch.Tensor], _draws: list[Draws]) -> list[torch.Tensor]:
        return [x for crop in crops for x in augmented(crop)]

    return work.through(step)


def contestants(device_: torch.device) -> dict[str, Callable[[Work], Function]]:
    """Contestants for the device."""
    ours = {"device": device, "kernel": kernel} if device_.type == "cuda" else {"rows": rows}
    return {"copy": copy, **ours, "kornia": kornia, "torchvision-v2": torchvision_v2}


# --- The command ------------------------------------------------------------------------------------------------------


def measure(config: AugmentOptions) -> Report:
    """Augmentation of uint8 crops: operations and recipes, ours and the peers, against the memory's speed."""
    torch.set_num_threads(1)
    on = torch.device(config.device)
    if config.dtype == "auto":
        config.dtype = "float16" if on.type == "cuda" else "float32"
    wanted = workloads(config.size)
    for name in config.workloads:
        if name not in wanted:
            raise unknown("workload", name, wanted)
    wanted = {name: view for name, view in wanted.items() if not config.workloads or name in config.workloads}
    who = contestants(on)
    names = chosen(who, config)
    missing = {"kornia": not_installed("kornia", "pip install kornia")}
    report = Report([], [], {name: why for name, why in missing.items() if why and name in names})
    names = [name for name in names if name not in report.skipped]
    if not names:
        raise UserError("nobody is left to be measured: see --only and --skip")
    for num_views in config.num_views:
        crops = {size: real_crops(config, size, num_views) for size in {v.size for v in wanted.values()}}
        rows_ = []
        for name, view in wanted.items():
            work = make_work(config, view, crops[view.size])
            torch.compiler.reset()  # each workload is another compilation of the same function: too many to keep
            runs = interleave({who_: timed_on(on, who[who_](work)) for who_ in names}, config.repeats)
            rows_ += make_rows(name, num_views, work, runs)
        report.rows += rows_
        report.tables.append(shown_table(config, num_views, rows_))
    return report


def make_rows(workload: str, num_views: int, work: Work, runs: dict[str, list[Run]]) -> list[dict[str, Any]]:
    """The rows of one workload."""
    ms = {
        name: [1000 * (run.cpu_s if work.on_cpu else run.elapsed_s) / work.num_views for run in measured]
        for name, measured in runs.items()
    }
    if "copy" in ms:
        moved = 2 * work.num_copies * COPY_BYTES[work.device.type]
        ms["copy"] = [value * work.num_views * work.bytes_per_view / moved for value in ms["copy"]]
    ours = ms.get("rows" if work.on_cpu else "device")
    return [
        {
            "workload": workload,
            "contestant": name,
            "num_views": num_views,
            "size": work.view.size,
            "ms_per_view": figure(values),
            "views_per_s": figure([1000 / v for v in values]),
            "gb_per_s": figure([work.bytes_per_view / v / 1e6 for v in values]),
            "of_roofline": ratio(ms["copy"], values) if "copy" in ms else None,
            "over_ours": ratio(values, ours) if ours else None,
        }
        for name, values in ms.items()
    ]


def shown_table(config: AugmentOptions, num_views: int, rows_: Sequence[dict[str, Any]]) -> Table:
    """The figures of one K for people."""

    def micro(row: dict[str, Any]) -> dict[str, float]:
        return {key: 1000 * row["ms_per_view"][key] for key in ("median", "min", "max")}

    return table(
        f"{num_views} x {config.batch_size} views to {config.dtype} on the {config.device}",
        rows_,
        {
            "workload": "workload",
            "px": lambda row: str(row["size"]),
            "contestant": "contestant",
            "GPU us/view" if config.device != "cpu" else "CPU us/view": micro,
            "min-max": lambda row: spread(micro(row)),
            "views/s": "views_per_s",
            "GB/s": "gb_per_s",
            "% of roofline": lambda row: row["of_roofline"] and 100 * row["of_roofline"]["median"],
            "x ours": "over_ours",
        },
    )


if __name__ == "__main__":
    sys.exit(common.main("augment", AugmentOptions, measure))
