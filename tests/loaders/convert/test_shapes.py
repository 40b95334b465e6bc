"""The generated pictures: reproducible, mixed in size, balanced, and not to be told apart by pixels or colour."""

import io
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from loaders.convert import shapes
from loaders.errors import UserError

NUM_TRAIN, NUM_VAL = 720, 180
CHANCE = 1 / len(shapes.CLASSES)


def decode(index: int, split: str) -> tuple[Image.Image, int]:
    jpeg, label = shapes.render(index, split=split)
    return Image.open(io.BytesIO(jpeg)), label


@pytest.fixture(scope="module")
def pictures() -> dict[str, list[tuple[Image.Image, int]]]:
    return {s: [decode(i, s) for i in range(n)] for s, n in (("train", NUM_TRAIN), ("val", NUM_VAL))}


def knn_accuracy(pictures: dict, feature, k: int = 20) -> float:
    """Share of val whose label wins among its k nearest by cosine in train, after the train mean is taken off."""
    x_ND, x_MD = (np.stack([feature(image) for image, _ in pictures[s]]).astype(np.float64) for s in ("train", "val"))
    y_N, y_M = ([label for _, label in pictures[s]] for s in ("train", "val"))
    mean = x_ND.mean(0)
    return KNeighborsClassifier(k, metric="cosine").fit(x_ND - mean, y_N).score(x_MD - mean, y_M)


def test_same_bytes_on_every_call_and_thread():
    expected = [shapes.render(i) for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(shapes.render, [*range(24)] * 3)) == expected * 3


def test_seed_split_and_index_each_change_the_picture():
    keys = [(i, seed, split) for i in range(12) for seed in (0, 1) for split in ("train", "val")]
    jpegs = {shapes.render(i, seed=seed, split=split)[0] for i, seed, split in keys}
    assert len(jpegs) == len(keys)


def test_jpegs_are_rgb_of_mixed_sizes_in_range(pictures):
    images = [image for image, _ in pictures["val"]]
    assert {(image.format, image.mode) for image in images} == {("JPEG", "RGB")}
    width, height = np.array([image.size for image in images]).T
    low, high = shapes.SIDE_PX
    for side in (width, height):
        assert low <= side.min() < low + 10 and high - 10 < side.max() <= high
        assert len(set(side)) > 30
    assert abs(np.corrcoef(width, height)[0, 1]) < 0.3
    assert 0.3 < np.mean(width > height) < 0.7


@pytest.mark.parametrize("split", ["train", "val"])
def test_classes_are_balanced(pictures, split):
    counts = Counter(label for _, label in pictures[split])
    assert len(shapes.CLASSES) >= 10
    assert counts == dict.fromkeys(range(len(shapes.CLASSES)), len(pictures[split]) // len(shapes.CLASSES))


def test_every_kind_has_its_own_silhouette_and_surface():
    surfaces, silhouettes = zip(*(name.split("_") for name in shapes.CLASSES), strict=True)
    assert sorted(surfaces) == sorted(shapes.SURFACES) and sorted(silhouettes) == sorted(shapes.SILHOUETTES)


@pytest.mark.parametrize("name", shapes.SILHOUETTES)
def test_silhouettes_about_fill_the_unit_disc(name):
    v, u = np.mgrid[-1.5:1.5:301j, -1.5:1.5:301j]
    inside = shapes.SILHOUETTES[name](shapes.Plane(u, v)) < 0
    radius = np.hypot(u, v)[inside]
    assert 0.85 < radius.max() < 1.2  # one that reaches further would be cut off by its window
    assert 0.8 < inside.sum() * 0.01**2 < np.pi


@pytest.mark.parametrize("name", shapes.SURFACES)
def test_surfaces_show_both_colours(name):
    v, u = np.mgrid[-3:3:200j, -3:3:200j]
    assert 0.15 < np.mean(shapes.SURFACES[name](shapes.Plane(u, v)) > 0) < 0.85


def test_neither_raw_pixels_nor_mean_colour_name_the_class(pictures):
    accuracy = knn_accuracy(pictures, lambda image: np.asarray(image.resize((32, 32))).ravel())
    assert accuracy < 0.25, accuracy
    accuracy = knn_accuracy(pictures, lambda image: np.asarray(image).mean((0, 1)))
    assert accuracy < CHANCE + 0.09, accuracy  # four standard deviations of a guess over 180 pictures


def test_texture_does(pictures):
    """The power spectrum by frequency alone, blind to place, colour and direction, is well above chance."""

    def spectrum(image: Image.Image) -> np.ndarray:
        gray = np.asarray(image.convert("L"), dtype=np.float64)[:96, :96]
        power = np.abs(np.fft.rfft2(gray - gray.mean())) ** 2
        frequency = np.hypot(np.fft.fftfreq(96)[:, None], np.fft.rfftfreq(96))
        band = np.minimum(frequency * 48, 23).astype(int)
        energy = np.log(np.bincount(band.ravel(), power.ravel()) + 1)
        return energy - energy.mean()

    accuracy = knn_accuracy(pictures, spectrum)
    assert accuracy > CHANCE + 0.2, accuracy


@pytest.mark.parametrize("bad", [{"index": -1}, {"index": 0, "split": "test"}, {"index": 0, "seed": -1}])
def test_bad_arguments_are_user_errors(bad):
    with pytest.raises(UserError, match="shapes"):
        shapes.render(**bad)
