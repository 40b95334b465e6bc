"""What a view costs the host: this loader, the floor beneath it, and the recipe everybody uses.

    python -m benchmarks.loader --data TRAIN.beton [--num-views 4] [--size 224] [--repeats 5] [--json FILE]

Contestants, interleaved within each repeat, on the same images in the same process, one thread each:

    floor      libjpeg-turbo decode and K uint8 antialiased resizes by the same boxes, nothing else
    crops      this loader's CPU backend up to the same point: order, draws, read, decode, crops
    views      this loader to the end: normalised float views under SimSiam's augmentation
    pil        the usual recipe to the same end: Pillow and torchvision transforms in a torch DataLoader

The figure is CPU time of the whole process per view, which a busy machine disturbs far less than elapsed time.
"""

from __future__ import annotations

import dataclasses
import io
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
import tyro
from PIL import Image, ImageFilter
from rich.console import Console
from rich.table import Table
from torchvision import transforms

import loaders
from fastssl.cli import run_command
from loaders.backends.cpu import decode
from loaders.beton import Reader
from loaders.draw import draw


@dataclass(kw_only=True)
class Config:
    """CPU milliseconds per view: this loader, the floor and the usual recipe."""

    data: Path
    """Images (.beton); ImageNet originals say most."""
    num_views: int = 4
    """K: views per image."""
    size: int = 224
    """Side of the views, px."""
    images: int = 192
    """Images per repeat, at most."""
    batch_size: int = 32
    """Images per batch."""
    repeats: int = 5
    """Repeats; the table shows medians and spread."""
    json: Path | None = None
    """Write every single measurement to this file."""


class PillowBlur:
    """SimSiam's and MoCo v2's blur: Pillow's GaussianBlur with sigma from a range."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(np.random.uniform(0.1, 2.0)))


class UsualDataset(torch.utils.data.Dataset):
    """Decoded by Pillow once, transformed K times: what lightly, solo-learn and the papers' code do."""

    def __init__(self, reader: Reader, num_views: int, size: int, num_images: int):
        self.reader, self.num_views, self.num_images = reader, num_views, num_images
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
                transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                transforms.RandomGrayscale(p=0.2),
                transforms.RandomApply([PillowBlur()], p=0.5),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(loaders.views.IMAGENET_MEAN, loaders.views.IMAGENET_STD),
            ]
        )

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        image = Image.open(io.BytesIO(bytes(self.reader[index].jpeg))).convert("RGB")
        return [self.transform(image) for _ in range(self.num_views)]


def contestants(config: Config) -> tuple[dict[str, Callable[[int], None]], int]:
    """Name -> a function that goes through the images once (given the epoch), and the number of images."""
    reader = Reader(config.data)
    num = min(config.images, len(reader)) // config.batch_size * config.batch_size
    if num == 0:
        raise loaders.UserError(
            f"{config.data} holds fewer than {config.batch_size} images: use --batch-size {len(reader)}"
        )
    spec = loaders.views.simsiam(config.num_views, config.size)
    index = np.arange(num)
    crop = torch.empty(1, config.size, config.size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    # Drawn beforehand: the floor only decodes and resizes.
    fixed = draw(spec, seed=0, epoch=0, index_B=index, height_B=reader.height[index], width_B=reader.width[index])
    boxes = [[d.box_B4[i].tolist() for d in fixed] for i in index]

    def floor(_epoch: int) -> None:
        for i in range(num):
            image = decode(reader[i])[None]
            for top, left, height, width in boxes[i]:
                region = image[:, :, top : top + height, left : left + width]
                torch._C._nn._upsample_bilinear2d_aa(region, (config.size, config.size), False, out=crop)

    options = {"batch_size": config.batch_size, "order": "sequential", "subset": index, "workers": 1, "prefetch": 1}
    views_loader = loaders.open(config.data, spec, **options)
    crops_loader = loaders.open(config.data, spec, **options)
    crops_loader.host_augment = False  # its batches are read as crops below, and never become views
    crops_loader._finish = lambda _slot, job: job.crops

    def through(loader: loaders.Loader) -> Callable[[int], None]:
        def run(epoch: int) -> None:
            for _batch in loader.epoch(epoch):
                pass

        return run

    usual = UsualDataset(reader, config.num_views, config.size, num)

    def pil(epoch: int) -> None:
        torch.manual_seed(epoch)
        # No worker processes: their pickling would only add to what this recipe costs.
        for _batch in torch.utils.data.DataLoader(usual, config.batch_size):
            pass

    return {"floor": floor, "crops": through(crops_loader), "views": through(views_loader), "pil": pil}, num


def measure(config: Config) -> dict[str, list[float]]:
    """CPU ms per view, one number per repeat and contestant. The first round is not counted."""
    torch.set_num_threads(1)
    runs, num = contestants(config)
    milliseconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(config.repeats + 1):
        for name, run in runs.items():
            start = time.process_time()
            run(repeat)
            if repeat:
                spent = time.process_time() - start
                milliseconds[name].append(1000 * spent / (num * config.num_views))
    return milliseconds


def show(console: Console, config: Config, milliseconds: dict[str, list[float]]) -> None:
    """Medians, spread and ratios."""
    table = Table(
        title=f"CPU ms per view, K={config.num_views}, {config.size} px, {config.data.name}", title_justify="left"
    )
    for column in ("what", "median", "min", "max", "x floor", "x less than pil"):
        table.add_column(column, justify="left" if column == "what" else "right")
    median = {name: statistics.median(values) for name, values in milliseconds.items()}
    for name, values in milliseconds.items():
        floor = statistics.median(a / b for a, b in zip(values, milliseconds["floor"], strict=True))
        pil = statistics.median(b / a for a, b in zip(values, milliseconds["pil"], strict=True))
        row = [f"{median[name]:.3f}", f"{min(values):.3f}", f"{max(values):.3f}", f"{floor:.2f}", f"{pil:.2f}"]
        table.add_row(name, *row)
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status."""

    def command(arguments: list[str]) -> int:
        config = tyro.cli(Config, prog="python -m benchmarks.loader", args=arguments)
        milliseconds = measure(config)
        show(Console(), config, milliseconds)
        if config.json is not None:
            about = {
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "machine": platform.processor(),
            }
            options = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}
            text = json.dumps({"options": options, "about": about, "cpu_ms_per_view": milliseconds}, indent=1)
            config.json.write_text(text + "\n", encoding="utf-8")
        return 0

    return run_command("benchmarks.loader", command, argv)


if __name__ == "__main__":
    sys.exit(main())
