"""The contestants of `benchmarks.loader`: the floor, this project's backends, and the peers as their users run them.

Each is a function of (config, K, workers) that opens the data and returns the batches of a round: for stage `crops`
lists of K uint8 tensors, for stage `views` lists of K float32 tensors [B, 3, S, S] under SimSiam's augmentation
(random resized crop 0.2 to 1, jitter 0.4/0.4/0.4/0.1 with p 0.8, gray 0.2, blur 0.5, flip 0.5, normalise), on the
device. All take the same images of the same file, whose bytes come from the page cache: opening single files is
spared to everybody. `workers` are threads, with a torch DataLoader processes; one worker means that the DataLoader
works in the main process, which spares it pickling and shared memory.

The peers, and how to get them:

    pil             Pillow and torchvision.transforms in a DataLoader, as in SimSiam's code: decoded once, K times
                    transformed. What solo-learn (without DALI) and most papers' code do.
    torchvision-v2  decode_jpeg and transforms.v2 on tensors: the crop in uint8, antialiased, as torchvision's guide
                    recommends; the rest in float, which costs 5 % less than uint8 to the end. Blur of 13 taps (3
                    sigma), as ours: its users write 23, which costs more.
    lightly         lightly.transforms.FastSiamTransform, unchanged, in a DataLoader.
                    pip install --no-deps lightly lightly_utils && pip install lightning_utilities
    dali-full       DALI: bytes straight from the memory map (no copy), decoded once, K times random_resized_crop,
                    color_twist, gaussian_blur, crop_mirror_normalize, all with DALI's own random numbers.
                    Conditional execution, so that nothing is computed that was not drawn; gray is saturation 0 in
                    the same color_twist. The outputs are taken over without a copy. On a GPU the decoder is `mixed`
                    and all else runs there. With K = 1 decoder and crop are fused, which is then the fastest.
                    It does less than the others: hue is a linear approximation, the jitter's order is fixed.
                    pip install nvidia-dali-cuda130
    ffcv-per-view   FFCV with one pipeline per view, each beginning with its RandomResizedCrop decoder, then its own
                    flip, brightness, contrast, saturation and NormalizeImage; on a GPU torch normalises there. It
                    does less than the others: FFCV has no hue, gray and blur. os_cache; one batch ahead, which is
                    fastest here, as it touches the least memory. tools/install_ffcv.sh

`dali-full-crops` and `ffcv-per-view-crops` are the same, stopped at the uint8 crops.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

import loaders
from benchmarks.common import Batches, CommonOptions, not_installed
from loaders import backends
from loaders.backends.cpu import RESIZE, decode
from loaders.batch import empty_images
from loaders.beton import TYPE_IMAGE, Reader
from loaders.dataset import Dataset, open_data
from loaders.draw import draw
from loaders.machine import thread_pool

MEAN, STD = loaders.views.IMAGENET_MEAN, loaders.views.IMAGENET_STD
SCALE = (0.2, 1.0)  # of SimSiam's crops
JITTER = (0.4, 0.4, 0.4, 0.1)
SIGMA = (0.1, 2.0)
BLUR_TAPS = 13


@dataclass(frozen=True)
class Contestant:
    """A contestant. `whose`: floor, ours or peer; `stage`: crops or views; `modules`: imported before timing."""

    name: str
    whose: str
    stage: str
    build: Callable[[CommonOptions, int, int], Batches]
    missing: Callable[[torch.device], str | None]
    modules: tuple[str, ...] = ()


def contestants() -> dict[str, Contestant]:
    """All contestants by name, also those that cannot run here."""

    def nothing(_device: torch.device) -> None:
        return None

    found = [Contestant("floor", "floor", "crops", floor, nothing)]
    for name in backends.available():
        backend, modules = backends.find(name), _MODULES.get(name, ())
        if not backend.ready_made:
            crops = partial(ours, name, "crops")
            found.append(Contestant(f"{name}-crops", "ours", "crops", crops, backend.missing, modules))
        found.append(Contestant(name, "ours", "views", partial(ours, name, "views"), backend.missing, modules))

    def peer(name: str, stage: str, build: Callable, package: str = "torch", install: str = "") -> None:
        def missing(device: torch.device) -> str | None:
            del device
            return not_installed(package, install)

        found.append(Contestant(name, "peer", stage, build, missing, _MODULES.get(package, ())))

    lightly_install = "pip install --no-deps lightly lightly_utils && pip install lightning_utilities"
    dali_install, ffcv_install = "pip install nvidia-dali-cuda130", "run tools/install_ffcv.sh"
    peer("pil", "views", pil)
    peer("torchvision-v2", "views", torchvision_v2)
    peer("lightly", "views", lightly, "lightly", lightly_install)
    peer("dali-full-crops", "crops", partial(dali_full, "crops"), "nvidia.dali", dali_install)
    peer("dali-full", "views", partial(dali_full, "views"), "nvidia.dali", dali_install)
    peer("ffcv-per-view-crops", "crops", partial(ffcv_per_view, "crops"), "ffcv", ffcv_install)
    peer("ffcv-per-view", "views", partial(ffcv_per_view, "views"), "ffcv", ffcv_install)
    return {c.name: c for c in found}


_MODULES = {
    "dali": ("nvidia.dali.fn",),
    "nvidia.dali": ("nvidia.dali.fn",),
    "ffcv": ("ffcv.loader", "ffcv.transforms"),
    "lightly": ("lightly.transforms",),
}


def indices(config: CommonOptions, reader: Dataset) -> np.ndarray:
    """The samples of a round, in order: whole batches, from the start of the file again if need be."""
    return np.arange(config.images // config.batch_size * config.batch_size) % len(reader)


# --- The floor and our own backends -----------------------------------------------------------------------------------


def floor(config: CommonOptions, num_views: int, workers: int) -> Batches:
    """libjpeg-turbo's decode and K uint8 antialiased resizes by boxes drawn beforehand, and nothing else."""
    torch.set_num_threads(1)
    reader = Reader(config.data)
    spec = loaders.views.simsiam(num_views, config.size)
    index = indices(config, reader)
    sides = {"height_B": reader.height[index], "width_B": reader.width[index]}
    boxes = [d.box_B4.tolist() for d in draw(spec, seed=0, epoch=0, index_B=index, **sides)]
    crops = [empty_images(workers, config.size, torch.uint8) for _ in range(num_views)]
    size = (config.size, config.size)

    def part(rows: range, worker: int) -> None:
        for row in rows:
            image = torch.from_numpy(decode(reader[index[row]])).permute(2, 0, 1)[None]
            for box, crop in zip(boxes, crops, strict=True):
                top, left, height, width = box[row]
                region = image[:, :, top : top + height, left : left + width]
                RESIZE["bilinear"](region, size, False, out=crop[worker : worker + 1])

    if workers == 1:

        def round_(_number: int) -> Iterator[list[torch.Tensor]]:
            for start in range(0, len(index), config.batch_size):
                part(range(start, start + config.batch_size), 0)
                yield crops
    else:
        pool = thread_pool(workers, "floor")

        def round_(_number: int) -> Iterator[list[torch.Tensor]]:
            list(pool.map(part, [range(w, len(index), workers) for w in range(workers)], range(workers)))
            yield crops

    return round_


def ours(name: str, stage: str, config: CommonOptions, num_views: int, workers: int) -> Batches:
    """Our loader with one of its backends, to normalised views or (what the host pays beside a GPU) to uint8 crops."""
    torch.set_num_threads(1)
    reader = open_data(config.data)
    loader = loaders.Loader(
        reader,
        loaders.views.simsiam(num_views, config.size),
        batch_size=config.batch_size,
        device=config.device,
        backend=name,
        order="sequential",
        subset=indices(config, reader),
        workers=workers,
        augment=stage == "views",
    )
    return lambda number: (batch.views for batch in loader.epoch(number))


# --- Peers in a torch DataLoader --------------------------------------------------------------------------------------


class ViewsDataset(torch.utils.data.Dataset):
    """The K views that `transform` makes of each sample, which `decode_bytes` decodes once."""

    def __init__(self, config: CommonOptions, decode_bytes: Callable, transform: Callable):
        self.reader = Reader(config.data)
        self.index = indices(config, self.reader)
        self.decode_bytes, self.transform = decode_bytes, transform

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> list[torch.Tensor]:
        return self.transform(self.decode_bytes(self.reader[self.index[i]].jpeg))


class Repeated:
    """A transform of one view, applied K times."""

    def __init__(self, transform: Callable, num_views: int):
        self.transform, self.num_views = transform, num_views

    def __call__(self, image: object) -> list[torch.Tensor]:
        return [self.transform(image) for _ in range(self.num_views)]


def _data_loader(config: CommonOptions, dataset: torch.utils.data.Dataset, workers: int) -> Batches:
    torch.set_num_threads(1)
    cuda = torch.device(config.device).type == "cuda"
    loader = torch.utils.data.DataLoader(
        dataset,
        config.batch_size,
        num_workers=workers if workers > 1 else 0,
        persistent_workers=workers > 1,
        pin_memory=cuda,
    )

    def round_(_number: int) -> Iterator[list[torch.Tensor]]:
        for views in loader:
            yield [v.to(config.device, non_blocking=True) for v in views] if cuda else views

    return round_


def _decode_pil(jpeg: np.ndarray):
    from PIL import Image

    return Image.open(io.BytesIO(jpeg)).convert("RGB")


class PillowBlur:
    """SimSiam's and MoCo v2's blur: Pillow's GaussianBlur with sigma from a range."""

    def __call__(self, image):
        from PIL import ImageFilter

        return image.filter(ImageFilter.GaussianBlur(np.random.uniform(*SIGMA)))


def pil(config: CommonOptions, num_views: int, workers: int) -> Batches:
    """SimSiam's augmentation as its authors wrote it."""
    from torchvision import transforms as t

    transform = t.Compose(
        [
            t.RandomResizedCrop(config.size, scale=SCALE),
            t.RandomApply([t.ColorJitter(*JITTER)], p=0.8),
            t.RandomGrayscale(p=0.2),
            t.RandomApply([PillowBlur()], p=0.5),
            t.RandomHorizontalFlip(),
            t.ToTensor(),
            t.Normalize(MEAN, STD),
        ]
    )
    return _data_loader(config, ViewsDataset(config, _decode_pil, Repeated(transform, num_views)), workers)


def _decode_tensor(jpeg: np.ndarray) -> torch.Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg

    return decode_jpeg(torch.from_numpy(jpeg.copy()), ImageReadMode.RGB)


def torchvision_v2(config: CommonOptions, num_views: int, workers: int) -> Batches:
    """The same with transforms.v2 on uint8 tensors."""
    from torchvision.transforms import v2 as t

    transform = t.Compose(
        [
            t.RandomResizedCrop(config.size, scale=SCALE, antialias=True),
            t.ToDtype(torch.float32, scale=True),
            t.RandomApply([t.ColorJitter(*JITTER)], p=0.8),
            t.RandomGrayscale(p=0.2),
            t.RandomApply([t.GaussianBlur(BLUR_TAPS, SIGMA)], p=0.5),
            t.RandomHorizontalFlip(),
            t.Normalize(MEAN, STD),
        ]
    )
    return _data_loader(config, ViewsDataset(config, _decode_tensor, Repeated(transform, num_views)), workers)


def lightly(config: CommonOptions, num_views: int, workers: int) -> Batches:
    """lightly's FastSiam transform, unchanged."""
    from lightly.transforms import FastSiamTransform

    transform = FastSiamTransform(num_views=num_views, input_size=config.size)
    return _data_loader(config, ViewsDataset(config, _decode_pil, transform), workers)


# --- DALI -------------------------------------------------------------------------------------------------------------


def dali_full(stage: str, config: CommonOptions, num_views: int, workers: int) -> Batches:
    """DALI alone, from bytes to the end."""
    from nvidia.dali import fn, pipeline_def, types

    device = torch.device(config.device)
    gpu = device.type == "cuda"
    reader = Reader(config.data)
    batches = indices(config, reader).reshape(-1, config.batch_size)
    crop = {"random_area": SCALE, "random_aspect_ratio": (3 / 4, 4 / 3)}
    decoding = {"device": "mixed" if gpu else "cpu", "output_type": types.RGB, "adjust_orientation": False}

    def source(step: int) -> list[np.ndarray]:
        if step >= len(batches):
            raise StopIteration
        return [reader[i].jpeg for i in batches[step]]

    def uniform(low: float, high: float):
        return fn.random.uniform(range=(low, high))

    @pipeline_def(
        batch_size=config.batch_size,
        num_threads=workers,
        device_id=(device.index or 0) if gpu else None,
        enable_conditionals=True,
    )
    def pipeline():
        jpegs = fn.external_source(source=source, batch=True, dtype=types.UINT8, ndim=1, no_copy=True)
        if num_views > 1:
            image = fn.decoders.image(jpegs, **decoding)
        views = []
        for _ in range(num_views):
            if num_views > 1:
                x = fn.random_resized_crop(image, size=config.size, **crop)
            else:
                x = fn.resize(fn.decoders.image_random_crop(jpegs, **decoding, **crop), size=config.size)
            if stage == "views":
                jitter = fn.random.coin_flip(probability=0.8, dtype=types.BOOL)
                gray = fn.random.coin_flip(probability=0.2, dtype=types.BOOL)
                blur = fn.random.coin_flip(probability=0.5, dtype=types.BOOL)
                amount, color = fn.cast(jitter, dtype=types.FLOAT), 1 - fn.cast(gray, dtype=types.FLOAT)
                brightness, contrast, saturation = (1 + amount * uniform(-s, s) for s in JITTER[:3])
                hue = amount * uniform(-360 * JITTER[3], 360 * JITTER[3])
                if jitter or gray:
                    x = fn.color_twist(
                        x, brightness=brightness, contrast=contrast, saturation=saturation * color, hue=hue
                    )
                if blur:
                    x = fn.gaussian_blur(x, sigma=uniform(*SIGMA))
                x = fn.crop_mirror_normalize(
                    x,
                    dtype=types.FLOAT,
                    output_layout="HWC",
                    mean=[255 * m for m in MEAN],
                    std=[255 * s for s in STD],
                    mirror=fn.random.coin_flip(),
                )
            views.append(x)
        return tuple(views)

    pipe = pipeline()
    pipe.build()

    def round_(_number: int) -> Iterator[list[torch.Tensor]]:
        while True:
            try:
                outputs = pipe.run()
            except StopIteration:
                pipe.reset()
                return
            yield [torch.from_dlpack(x.as_tensor()).permute(0, 3, 1, 2) for x in outputs]

    return round_


# --- FFCV -------------------------------------------------------------------------------------------------------------


def ffcv_per_view(stage: str, config: CommonOptions, num_views: int, workers: int) -> Batches:
    """FFCV with a pipeline, and so a decoding, for every view."""
    from ffcv import transforms as t
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline.pipeline_spec import PipelineSpec
    from torchvision.transforms import Normalize

    device = torch.device(config.device)
    reader = Reader(config.data)
    mean, std = 255 * np.array(MEAN), 255 * np.array(STD)

    def operations() -> list:
        ops = [RandomResizedCropRGBImageDecoder((config.size, config.size), scale=SCALE)]
        if stage == "views":
            ops += [t.RandomHorizontalFlip(), *(op(s, 0.8) for op, s in zip(jitter, JITTER, strict=False))]
        if stage == "views" and device.type == "cpu":
            ops.append(t.NormalizeImage(mean, std, np.float32))
        ops += [t.ToTensor(), t.ToTorchImage()]
        if stage == "views" and device.type == "cuda":
            ops[-1:] = [t.ToDevice(device), t.ToTorchImage(), t.Convert(torch.float32), Normalize(mean, std)]
        return ops

    jitter = (t.RandomBrightness, t.RandomContrast, t.RandomSaturation)
    image = next(f.name for f in reader.fields if f.type_id == TYPE_IMAGE)
    loader = Loader(
        str(config.data),
        batch_size=config.batch_size,
        num_workers=workers,
        os_cache=True,
        order=OrderOption.SEQUENTIAL,
        indices=indices(config, reader),
        pipelines={
            **{field.name: None for field in reader.fields},
            **{f"view {k}": PipelineSpec(image, transforms=operations()) for k in range(num_views)},
        },
        batches_ahead=1,
    )
    return lambda _number: (list(views) for views in loader)
