"""What every backend has in common: the drawn boxes, Pillow's pixels, one way with broken samples, a clean end.

Parametrised over all backends there are, on the CPU and on CUDA; those that cannot run here are skipped.
"""

from __future__ import annotations

import functools
import gc
import importlib
import io
import itertools
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import jpeg_bytes, overwrite, photo, write_beton
from PIL import Image

import loaders
from loaders import UserError, backends
from loaders.beton import MODE_RAW, Reader, Writer
from loaders.draw import draw
from loaders.job import BadSample
from loaders.views import View

# Mean absolute difference to Pillow, in 1/255. ffcv decodes with the fast, less exact DCT; where a box of 3 px is
# enlarged, DALI's cubic repeats the pixels at the edge that Pillow's leaves out, which comes to 0.54.
TOLERANCE = {"ffcv": 2.5, "dali": 0.6}
DEFAULT_TOLERANCE = 0.5
MARKS = {"dali": [pytest.mark.dali], "ffcv": [pytest.mark.ffcv]}
DEVICES = {"cpu": [], "cuda": [pytest.mark.gpu]}


def _params() -> Iterator:
    for name, device in itertools.product(backends.available(), DEVICES):
        if name != "synthetic":  # has no pixels to compare
            marks = MARKS.get(name, []) + DEVICES[device]
            if name == "ffcv":  # numba's finalizers of FFCV's compiled functions raise
                marks = [*marks, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]
            yield pytest.param((name, device), id=f"{name}-{device}", marks=marks)


@pytest.fixture(params=_params())
def opened(request: pytest.FixtureRequest) -> Iterator[functools.partial]:
    """`loaders.open` with backend and device filled in."""
    name, device = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    threads = torch.get_num_threads()
    missing = importlib.import_module(f"loaders.backends.{name}").Backend.missing(torch.device(device))
    torch.set_num_threads(threads)  # importing ffcv sets torch to one thread
    if missing is not None:
        pytest.skip(missing)
    yield functools.partial(loaders.open, backend=name, device=device)
    if name == "ffcv":
        gc.collect()  # the finalizers run now, not while some module is being parsed; see test_ffcv_interop.py


def plain(*views: View) -> loaders.ViewSpec:
    """Nothing but crops, as pixel values in 0..255."""
    return loaders.ViewSpec(views, mean=(0, 0, 0), std=(1 / 255,) * 3)


SPEC = plain(  # both interpolations at two sizes, as in multi-crop
    View(48),
    View(48, interpolation="bicubic"),
    View(24, scale=(0.05, 0.14), interpolation="bicubic"),
    View(31, scale=(0.05, 0.14)),
)

Crops = dict[int, list[torch.Tensor]]


def collect(opened: functools.partial, path: Path, *, epoch: int = 0, start_step: int = 0, **options: object) -> Crops:
    """Sample id -> its views [3, S, S] on the host, over one epoch."""
    seen: Crops = {}
    with opened(path, options.pop("spec", SPEC), **options) as loader:
        for batch in loader.epoch(epoch, start_step):
            for row, index in enumerate(batch.index.tolist()):
                views = [v[row].cpu().clone() for v in batch.views]
                if index in seen:  # it stands in for a broken one: the same views again
                    assert_same({index: seen[index]}, {index: views})
                seen[index] = views
    return seen


def assert_same(a: Crops, b: Crops) -> None:
    """Equal to the last bit on the CPU; a compiled and an eager form on the GPU round differently."""
    assert a.keys() == b.keys()
    for i in a:
        for k, (x, y) in enumerate(zip(a[i], b[i], strict=True)):
            difference = (x - y).abs().max()
            assert difference < 1e-3, f"sample {i}, view {k}: they differ by up to {difference:.3f}/255"


# --- Pixels -----------------------------------------------------------------------------------------------------------

KINDS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True},
    "quality 40": {"quality": 40},
}
SIZES = [(64, 80), (233, 311), (1, 1), (3, 900), (900, 3), (1500, 2000)]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """One JPEG of every kind, and what they are called."""
    rng = np.random.default_rng(0)
    images = {name: (photo(rng, 97, 131), options) for name, options in KINDS.items()}
    images["gray"] = (photo(rng, 97, 131).convert("L"), {})
    images |= {f"{height} x {width}": (photo(rng, height, width), {}) for height, width in SIZES}
    path = tmp_path_factory.mktemp("zoo") / "zoo.beton"
    with Writer(path, len(images)) as writer:
        for label, (image, options) in enumerate(images.values()):
            writer.add(jpeg_bytes(image, **options), image.height, image.width, label)
    return path, list(images)


def pillows(path: Path, spec: loaders.ViewSpec, *, seed: int = 0, epoch: int = 0) -> Crops:
    """The same crops by Pillow: decode, cut the drawn box, resize."""
    reader, crops = Reader(path), {}
    index = np.arange(len(reader))
    draws = draw(spec, seed=seed, epoch=epoch, index_B=index, height_B=reader.height, width_B=reader.width)
    for i in index.tolist():
        sample = reader[i]
        if sample.mode == MODE_RAW:
            image = Image.fromarray(np.array(sample.jpeg).reshape(sample.height, sample.width, 3))
        else:
            image = Image.open(io.BytesIO(sample.jpeg)).convert("RGB")
        crops[i] = []
        for view, d in zip(spec.views, draws, strict=True):
            top, left, height, width = d.box_B4[i].tolist()
            region = image.crop((left, top, left + width, top + height))
            resized = region.resize((view.size, view.size), getattr(Image.Resampling, view.interpolation.upper()))
            crops[i].append(torch.from_numpy(np.array(resized)).permute(2, 0, 1).float())
    return crops


def assert_pillows(ours: Crops, expected: Crops, names: list[str], tolerance: float) -> None:
    assert ours.keys() == expected.keys()
    far = {}
    for i, name in enumerate(names):
        for k, (x, y) in enumerate(zip(ours[i], expected[i], strict=True)):
            assert x.shape == y.shape
            difference = (x - y).abs().mean().item()
            if not difference <= tolerance:
                far[f"{name}, view {k}"] = round(difference, 2)
    assert not far, f"too far from Pillow, in 1/255: {far}"


def tolerance_of(opened: functools.partial) -> float:
    return TOLERANCE.get(opened.keywords["backend"], DEFAULT_TOLERANCE)


def test_crops_are_pillows(opened, zoo) -> None:
    path, names = zoo
    ours = collect(opened, path, batch_size=5, order="sequential", seed=3, epoch=2)  # the last batch is short
    assert_pillows(ours, pillows(path, SPEC, seed=3, epoch=2), names, tolerance_of(opened))


@pytest.mark.parametrize("spec", [plain(View(40, center=0.875)), plain(View(224), View(96, scale=(0.05, 0.14)))])
def test_whole_and_large_crops_are_pillows(opened, zoo, spec) -> None:
    path, names = zoo
    ours = collect(opened, path, spec=spec, batch_size=len(names), order="sequential")
    assert_pillows(ours, pillows(path, spec), names, tolerance_of(opened))


def test_raw_pixels_are_cropped_or_refused(opened, tmp_path) -> None:
    """Raw and compressed samples in one file, as fastssl-convert writes small lossless images."""
    rng, path = np.random.default_rng(0), tmp_path / "raw.beton"
    shapes = [(32, 40), (64, 64), (1, 1), (50, 33)]
    with Writer(path, 2 * len(shapes)) as writer:
        for height, width in shapes:
            image = photo(rng, height, width)
            writer.add(image.tobytes(), height, width, 0, mode=MODE_RAW)
            writer.add(jpeg_bytes(image), height, width, 0)
    try:
        loader = opened(path, SPEC, batch_size=3, order="sequential")
    except UserError as error:
        assert "raw" in str(error)
        pytest.skip(f"refused as it should be: {error}")
    loader.close()
    names = [f"{kind} {shape}" for shape in shapes for kind in ("raw", "jpeg")]
    ours = collect(opened, path, batch_size=3, order="sequential")
    assert_pillows(ours, pillows(path, SPEC), names, tolerance_of(opened))


def test_a_box_is_where_it_was_drawn_to_a_fraction_of_a_pixel(opened, tmp_path) -> None:
    """Gray that grows by 2 per column, or per row, so that a crop's pixels tell where it lies and how large it is.

    Symmetric resampling keeps the mean of a ramp. A box moved by a pixel is off by 1 px here, one that has grown at an
    end by 1/2. Measured in green: FFCV's fast DCT makes red and blue darker by 1.2/255.
    """
    num, path = 24, tmp_path / "ramps.beton"
    with Writer(path, num) as writer:
        for i in range(num):
            height, width = 127 - i, 104 + i
            ramp = 2 * np.mgrid[:height, :width][i % 2].astype(np.uint8)
            writer.add(jpeg_bytes(Image.fromarray(ramp).convert("RGB"), subsampling=0), height, width, 0)
    spec = plain(*(View(size, interpolation=kind) for size in (48, 96) for kind in ("bilinear", "bicubic")))
    reader, index = Reader(path), np.arange(num)
    draws = draw(spec, seed=0, epoch=0, index_B=index, height_B=reader.height, width_B=reader.width)
    for i, views in collect(opened, path, spec=spec, batch_size=num).items():
        for view, d in zip(views, draws, strict=True):
            first, side = d.box_B4[i, i % 2], d.box_B4[i, 2 + i % 2]
            profile = view[1].mean(1 - i % 2) / 2  # px
            near, far = profile.chunk(2)
            measured = {"centre": profile.mean(), "side": 2 * (far.mean() - near.mean())}
            for (what, ours), right in zip(measured.items(), (first + (side - 1) / 2, side), strict=True):
                assert abs(ours.item() - right) < 0.3, f"sample {i}: {what} at {ours:.2f} px, drawn was {right} px"


# --- Batches ----------------------------------------------------------------------------------------------------------


def test_views_depend_on_nothing_but_seed_epoch_and_sample(opened, beton: Path) -> None:
    """48 images: not on batch size, workers, prefetch, order, or where in the epoch one begins."""
    reference = collect(opened, beton, batch_size=8, epoch=1, workers=1, prefetch=1)
    assert len(reference) == 48
    assert_same(reference, collect(opened, beton, batch_size=20, epoch=1, order="sequential", workers=3))
    with opened(beton, SPEC, batch_size=16, workers=2) as loader:
        for start_step in (0, 2, 3):
            rest: Crops = {}
            for batch in loader.epoch(1, start_step):
                rest |= {i: [v[row].cpu().clone() for v in batch.views] for row, i in enumerate(batch.index.tolist())}
            assert len(rest) == 48 - 16 * start_step
            assert_same({i: reference[i] for i in rest}, rest)
        other = {i: [v[row].cpu() for v in b.views] for b in loader.epoch(2) for row, i in enumerate(b.index.tolist())}
    assert any((a - b).abs().max() > 10 for i in other for a, b in zip(reference[i], other[i], strict=True))


def test_batches_are_channels_last_on_the_device_and_counted(opened, beton: Path) -> None:
    with opened(beton, SPEC, batch_size=8, order="sequential", dtype=torch.bfloat16) as loader:
        for step, batch in enumerate(loader.epoch()):
            assert batch.index.tolist() == list(range(8 * step, 8 * step + 8))
            assert batch.label.tolist() == [i % 4 for i in batch.index.tolist()]
            for view, size in zip(batch.views, SPEC.sizes, strict=True):
                assert view.shape == (8, 3, size, size) and view.dtype == torch.bfloat16
                assert view.device.type == opened.keywords["device"]
                assert view.is_contiguous(memory_format=torch.channels_last)
        assert loader.stats.images == 48


# --- Broken samples ---------------------------------------------------------------------------------------------------


def damage(path: Path, index: int, kind: str) -> None:
    size = int(Reader(path).size[index])
    content = {
        "zeros": bytes(size),
        "beginning": bytes(300),
        "not a picture": (b"<html>404</html>" * size)[:size],
        # a whole JPEG of another size than the record says
        "another size": jpeg_bytes(Image.new("RGB", (17, 23))),
    }[kind]
    overwrite(path, index, content=content)


DAMAGES = ["zeros", "beginning", "not a picture", "another size"]


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_broken_sample_is_named(opened, tmp_path: Path, kind: str) -> None:
    path = write_beton(tmp_path / "broken.beton", 12)
    damage(path, 7, kind)
    with pytest.raises(UserError, match=r"sample 7 of .*broken\.beton") as caught:
        collect(opened, path, batch_size=4)
    assert isinstance(caught.value, BadSample) and caught.value.index == 7


@pytest.mark.filterwarnings("ignore:replaced")
def test_broken_samples_are_replaced_by_the_next_with_its_own_views(opened, tmp_path: Path) -> None:
    """Two in a row, the file's last (the first comes next), two in one batch, two in a short batch."""
    whole, path = write_beton(tmp_path / "whole.beton", 14), write_beton(tmp_path / "broken.beton", 14)
    for index, kind in {6: "zeros", 7: "another size", 10: "beginning", 13: "not a picture"}.items():
        damage(path, index, kind)
    reference = collect(opened, whole, batch_size=4, order="sequential", epoch=1)
    with opened(path, SPEC, batch_size=4, order="sequential", on_bad_sample="skip") as loader:
        order, labels, rows = [], [], []
        for batch in loader.epoch(1):
            order += batch.index.tolist()
            labels += batch.label.tolist()
            rows += [[v[row].cpu().clone() for v in batch.views] for row in range(len(batch.index))]
        assert loader.stats.replaced == 5
    assert order == [0, 1, 2, 3, 4, 5, 8, 8, 8, 9, 11, 11, 12, 0]
    assert labels == [i % 4 for i in order]
    for i, views in zip(order, rows, strict=True):
        assert_same({i: reference[i]}, {i: views})


# --- Ends -------------------------------------------------------------------------------------------------------------


def _threads() -> tuple[int, int]:
    """Python's threads, and all of the process (libraries have their own)."""
    tasks = "/proc/self/task"
    return threading.active_count(), len(os.listdir(tasks)) if os.path.isdir(tasks) else 0


def test_leaving_and_closing_in_mid_epoch_leaves_no_thread(opened, beton: Path) -> None:
    def leave() -> None:
        loader = opened(beton, SPEC, batch_size=4, workers=2)
        for _batch in itertools.islice(loader.epoch(), 2):
            pass
        assert len(list(loader.epoch(1))) == 12  # another epoch works
        batches = loader.epoch(2)
        next(batches)
        loader.close()  # while batches are under way

    leave()  # libraries start threads that stay, once
    before = _threads()
    leave()
    leave()
    patience = time.monotonic() + 10
    while any(a > b for a, b in zip(_threads(), before, strict=True)) and time.monotonic() < patience:
        time.sleep(0.05)
    after = _threads()
    assert after[0] <= before[0] and after[1] <= before[1]
