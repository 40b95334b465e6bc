"""Files written here against the real FFCV 1.0.2, and the other way round (tools/install_ffcv.sh)."""

import gc
import io
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from loaders import beton

_threads = torch.get_num_threads()
pytest.importorskip("ffcv", reason="ffcv is not installed (tools/install_ffcv.sh)")
torch.set_num_threads(_threads)  # importing ffcv sets torch to one thread, here for all tests of the session

pytestmark = [
    pytest.mark.ffcv,
    # numba's finalizers of FFCV's compiled functions raise; see below for when
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def _collect_here():
    """Let those finalizers run now, not at any later moment.

    pytest formats what they raise, and Python 3.11 parses source for that. If the collector comes while a module is
    being parsed (pytest rewrites imports), the inner parse breaks the outer one: "SystemError: AST constructor
    recursion depth mismatch" (python/cpython#106905), here at the end of 4 of 8 runs whose tests had all passed.
    """
    yield
    gc.collect()


NUM = 24


class Pictures:
    """A map-style data set of smooth pictures, each of its own size; labels count down."""

    def __init__(self, num=NUM, side=(40, 90)):
        rng = np.random.default_rng(0)
        self.pixels = []
        for _ in range(num):
            small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
            size = tuple(int(s) for s in rng.integers(*side, size=2))
            self.pixels.append(np.asarray(small.resize(size, Image.Resampling.BICUBIC)))

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return self.pixels[i], 1000 - i


def write_ffcv(path, data, fields=None, num_workers=1, page_size=8 << 20, chunksize=100, **image_options):
    """FFCV's own writer; its parent process waits for ever for a worker that died, so an alarm ends that."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    def give_up(*_):
        raise TimeoutError("FFCV's writer hangs; its worker's error is in the output above")

    fields = fields or {"image": RGBImageField(**image_options), "label": IntField()}
    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(120)
    try:
        writer = DatasetWriter(str(path), fields, page_size=page_size, num_workers=num_workers)
        writer.from_indexed_dataset(data, chunksize=chunksize)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def decode(sample):
    if sample.mode == beton.MODE_RAW:
        return sample.jpeg.reshape(sample.height, sample.width, 3)
    return np.asarray(Image.open(io.BytesIO(sample.jpeg)).convert("RGB"))


def jpeg(pixels, **options):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", **options)
    return out.getvalue()


def load_ffcv(path, os_cache=True):
    """All images and labels as FFCV's own Loader returns them, in file order."""
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    threads = torch.get_num_threads()
    pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
    options = {"order": OrderOption.SEQUENTIAL, "drop_last": False, "num_workers": 1, "os_cache": os_cache}
    loader = Loader(str(path), 8, pipelines=pipelines, **options)
    batches = [(np.array(images), np.array(labels)[:, 0]) for images, labels in loader]
    torch.set_num_threads(threads)
    return np.concatenate([x for x, _ in batches]), np.concatenate([y for _, y in batches]).tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"write_mode": "jpg", "jpeg_quality": 90},
        {"write_mode": "raw"},
        {"write_mode": "smart", "smart_threshold": 3 * 60 * 60},
        {"write_mode": "proportion", "compress_probability": 0.5},
    ],
    ids=lambda o: o["write_mode"],
)
def test_reads_what_ffcv_wrote_and_writes_the_same_file(tmp_path, options):
    data, theirs, ours = Pictures(), tmp_path / "theirs.beton", tmp_path / "ours.beton"
    write_ffcv(theirs, data, **options)
    reader = beton.Reader(theirs)
    assert [f.name for f in reader.fields] == ["image", "label"]
    assert reader.label.tolist() == [1000 - i for i in range(NUM)]
    modes = set(reader.mode.tolist())
    assert modes == {"jpg": {0}, "raw": {1}}.get(options["write_mode"], {0, 1})
    for sample, pixels in zip(reader, data.pixels, strict=True):
        assert (sample.height, sample.width) == pixels.shape[:2]
        if sample.mode == beton.MODE_RAW:
            np.testing.assert_array_equal(decode(sample), pixels)
        else:
            assert np.abs(decode(sample).astype(int) - pixels).mean() < 4

    with beton.Writer(ours, NUM, page_size=reader.page_size) as writer:
        for sample in reader:
            writer.add(*sample)
    assert ours.read_bytes() == theirs.read_bytes()


def test_same_bytes_over_several_pages(tmp_path):
    """Raw images of about 0.8 MB in pages of 2 MiB: two to a page, tails of zeros."""
    data, theirs, ours = Pictures(num=9, side=(500, 560)), tmp_path / "theirs.beton", tmp_path / "ours.beton"
    write_ffcv(theirs, data, page_size=2 << 20, write_mode="raw")
    with beton.Writer(ours, 9, page_size=2 << 20) as writer:
        for pixels, label in data:
            writer.add(pixels.tobytes(), *pixels.shape[:2], label, beton.MODE_RAW)
    assert ours.read_bytes() == theirs.read_bytes()


def test_reads_other_fields_in_any_order(tmp_path):
    from ffcv.fields import BytesField, FloatField, IntField, JSONField, RGBImageField

    pictures = Pictures(num=6)

    class Rows:
        def __len__(self):
            return 6

        def __getitem__(self, i):
            blob = np.full(11 + i, i, np.uint8)
            return blob, 0.5 * i, pictures.pixels[i], {"i": int(i)}, 70 + i, -i

    path = tmp_path / "rows.beton"
    fields = {
        "blob": BytesField(),
        "weight": FloatField(),
        "picture": RGBImageField(write_mode="raw"),
        "note": JSONField(),
        "klass": IntField(),
        "other": IntField(),
    }
    write_ffcv(path, Rows(), fields)
    reader = beton.Reader(path)
    assert [f.name for f in reader.fields] == list(fields)
    assert reader.label.tolist() == [70 + i for i in range(6)]
    for sample, pixels in zip(reader, pictures.pixels, strict=True):
        np.testing.assert_array_equal(decode(sample), pixels)


def test_reads_a_file_of_several_ffcv_workers(tmp_path):
    """The table is then in no order at all."""
    data, path = Pictures(num=60), tmp_path / "two.beton"
    write_ffcv(path, data, num_workers=2, chunksize=5, write_mode="raw")
    for sample, (pixels, label) in zip(beton.Reader(path), data, strict=False):
        np.testing.assert_array_equal(decode(sample), pixels)
        assert sample.label == label


@pytest.mark.parametrize("os_cache", [True, False])
@pytest.mark.parametrize("spare", [0, 7])
@pytest.mark.parametrize("mode", [beton.MODE_JPEG, beton.MODE_RAW])
def test_ffcv_reads_what_we_wrote(tmp_path, mode, spare, os_cache):
    """Original JPEG bytes and raw pixels, with all reserved records used and with some left over."""
    path, pictures = tmp_path / "ours.beton", Pictures()
    shape = (48, 64, 3)  # SimpleRGBImageDecoder wants one size
    pixels = [np.asarray(Image.fromarray(p).resize(shape[1::-1])) for p in pictures.pixels]
    blobs = [jpeg(p, quality=95, subsampling=0) if mode == beton.MODE_JPEG else p.tobytes() for p in pixels]
    with beton.Writer(path, NUM + spare, page_size=2 << 20) as writer:
        for i, blob in enumerate(blobs):
            writer.add(blob, *shape[:2], 5 * i, mode)
    images, labels = load_ffcv(path, os_cache)
    assert labels == [5 * i for i in range(NUM)]
    for image, sample in zip(images, beton.Reader(path), strict=True):
        difference = np.abs(image.astype(int) - decode(sample))
        if mode == beton.MODE_RAW:
            assert difference.max() == 0
        else:  # FFCV asks libjpeg-turbo for the fast, less exact DCT
            assert difference.mean() < 2.5
