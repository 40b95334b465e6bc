"""The generator is Philox, the draws are a sample's own, and their distributions are torchvision's."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF

from loaders.draw import ORDERS, Draws, draw, permutation, philox
from loaders.errors import UserError
from loaders.views import View, ViewSpec, byol, evaluation, simsiam

FIELDS = [field.name for field in dataclasses.fields(Draws)]


def draws_of(spec, num, *, height=375, width=500, seed=0, epoch=0, first=0):
    """Draws for `num` samples of one image size."""
    size = np.ones(num, dtype=np.int64)
    index = np.arange(first, first + num)
    return draw(spec, seed=seed, epoch=epoch, index_B=index, height_B=size * height, width_B=size * width)


def assert_distributed_alike(a, b, name=None):
    """Kolmogorov-Smirnov: fails with probability 1e-6 when the distributions are equal."""
    assert ks_2samp(a, b, method="asymp").pvalue > 1e-6, name


def box_statistics(boxes, height, width):
    top, left, h, w = boxes.T
    return {
        "top": top,
        "left": left,
        "height": h,
        "width": w,
        "area": h * w,
        "ratio": w / h,
        "top within its range": top / np.maximum(1, height - h),
        "left within its range": left / np.maximum(1, width - w),
    }


# --- the generator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # "philox4x32 10" in kat_vectors of the Random123 distribution, by the authors of the paper
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, answer):
    words = philox(tuple(np.uint32(word) for word in counter), tuple(key))
    assert [int(word) for word in words] == answer and all(word.dtype == np.uint32 for word in words)


def test_philox_broadcasts_and_is_elementwise():
    many = philox((np.arange(5), 7, np.arange(3)[:, None], 1), (3, 4))
    assert many[0].shape == (3, 5)
    one = philox((4, 7, 2, 1), (3, 4))
    assert [int(word[2, 4]) for word in many] == [int(word) for word in one]


def test_philox_words_are_uniform():
    words = np.concatenate(philox((np.arange(50_000), 0, 0, 0), (1, 2)))
    counts = np.bincount(words >> 24, minlength=256)
    chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert chi2 < 255 + 6 * np.sqrt(2 * 255)


# --- a sample's draws are its own -------------------------------------------------------------------------------------


def test_draws_do_not_depend_on_the_batch():
    spec = byol(64)
    rng = np.random.default_rng(0)
    index = rng.choice(10**12, 50, replace=False)
    height, width = rng.integers(1, 900, (2, 50))
    together = draw(spec, seed=5, epoch=7, index_B=index, height_B=height, width_B=width)
    part = rng.permutation(50)[:13]
    apart = draw(spec, seed=5, epoch=7, index_B=index[part], height_B=height[part], width_B=width[part])
    for a, b in zip(together, apart, strict=True):
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(a, name)[part], getattr(b, name), err_msg=name)


def test_draws_accept_the_files_own_integer_types():
    spec = simsiam(1)
    a = draw(spec, seed=0, epoch=0, index_B=np.array([70_000]), height_B=np.array([60_000]), width_B=np.array([300]))
    b = draw(
        spec,
        seed=0,
        epoch=0,
        index_B=np.array([70_000], np.uint32),
        height_B=np.array([60_000], np.uint16),
        width_B=np.array([300], np.uint16),
    )
    np.testing.assert_array_equal(a[0].box_B4, b[0].box_B4)


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}, {"first": 1000}, {"first": 2**32}])
def test_seed_epoch_and_sample_each_change_all_draws(change):
    a, b = draws_of(simsiam(1), 100)[0], draws_of(simsiam(1), 100, **change)[0]
    for name in ("box_B4", "factor_B4", "order_B4", "flip_B", "gray_B", "jitter_B", "sigma_B"):
        assert (getattr(a, name) != getattr(b, name)).any(), name
    assert (a.factor_B4 != b.factor_B4).all()


def test_equal_views_draw_differently():
    a, b = draws_of(simsiam(2), 100)
    assert (a.factor_B4 != b.factor_B4).all() and (a.box_B4 != b.box_B4).any(axis=1).all()


def test_changing_one_setting_leaves_the_other_draws():
    base = simsiam(1).views[0]
    before = draws_of(ViewSpec((base,)), 200)[0]
    for change, may_move in [
        ({"flip_p": 0.1}, {"flip_B"}),
        ({"jitter_p": 0.1}, {"jitter_B"}),
        ({"blur_p": 0.1}, {"sigma_B"}),
        ({"gray_p": 0.9}, {"gray_B"}),
        ({"solarize_p": 0.5}, {"solarize_B"}),
        ({"hue": 0.2}, {"factor_B4"}),
        ({"scale": (0.1, 0.5)}, {"box_B4"}),
    ]:
        after = draws_of(ViewSpec((dataclasses.replace(base, **change),)), 200)[0]
        moved = {name for name in FIELDS if (getattr(before, name) != getattr(after, name)).any()}
        assert moved == may_move, change


def test_draws_are_the_same_for_ever():
    """Changing any of these numbers changes every past run: do it knowingly."""
    (d,) = draws_of(simsiam(1), 2, seed=3, epoch=4, first=10)
    assert d.box_B4.tolist() == GOLDEN_BOXES
    assert d.order_B4.tolist() == GOLDEN_ORDERS
    np.testing.assert_allclose(d.factor_B4, GOLDEN_FACTORS, rtol=1e-6)
    assert permutation(8, seed=3, epoch=4).tolist() == GOLDEN_PERMUTATION


GOLDEN_BOXES = [[12, 111, 342, 286], [54, 17, 306, 334]]
GOLDEN_ORDERS = [[1, 0, 2, 3], [2, 1, 3, 0]]
GOLDEN_FACTORS = [[0.8414146, 1.1358521, 0.8594695, -0.0414747], [1.1107374, 1.2806716, 0.6670855, 0.0924798]]
GOLDEN_PERMUTATION = [4, 2, 7, 6, 0, 3, 5, 1]


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"seed": 2**32}, {"epoch": -1}, {"epoch": 2**32}])
def test_seed_and_epoch_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        draws_of(simsiam(1), 1, **wrong)


# --- crops ------------------------------------------------------------------------------------------------------------


@given(
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
    low=st.floats(0.01, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_boxes_lie_in_the_image(height, width, low, seed):
    boxes = draws_of(ViewSpec((View(32, scale=(low, 1.0)),)), 8, height=height, width=width, seed=seed)[0].box_B4
    top, left, h, w = boxes.T
    assert boxes.dtype == np.int32 and (boxes[:, 2:] >= 1).all() and (boxes[:, :2] >= 0).all()
    assert (top + h <= height).all() and (left + w <= width).all()


@pytest.mark.parametrize(
    ("height", "width", "scale"),
    [(375, 500, (0.2, 1.0)), (500, 333, (0.08, 1.0)), (160, 400, (0.4, 1.0)), (32, 32, (0.08, 1.0))],
)
def test_crops_are_distributed_as_torchvisions(height, width, scale):
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    num = 4000
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(num)])
    ours = draws_of(ViewSpec((View(32, scale=scale),)), 5 * num, height=height, width=width)[0].box_B4
    theirs, ours = (box_statistics(boxes, height, width) for boxes in (theirs, ours))
    for name, values in theirs.items():
        assert_distributed_alike(values, ours[name], name)


def test_crops_reach_every_border():
    top, left, h, w = draws_of(ViewSpec((View(8, scale=(0.25, 1.0)),)), 20_000, height=8, width=8)[0].box_B4.T
    assert top.min() == left.min() == 0 and (top + h).max() == (left + w).max() == 8
    assert h.max() == w.max() == 8 and len(np.unique(top)) > 4


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10), (1, 3000), (7, 300)])
def test_an_image_too_narrow_falls_back_to_its_centre(height, width):
    """No area of at least 90 % fits with a legal ratio, so torchvision falls back, without chance, and so do we."""
    expected = RandomResizedCrop.get_params(torch.empty(3, height, width), [0.9, 1.0], [3 / 4, 4 / 3])
    boxes = draws_of(ViewSpec((View(32, scale=(0.9, 1.0)),)), 50, height=height, width=width)[0].box_B4
    assert (boxes == np.array(expected)).all()


def test_the_whole_image_is_the_fallback_within_the_ratio():
    """A crop of the full area fits only if its ratio is the image's to a pixel: hardly ever in ten attempts."""
    view = View(8, scale=(1.0, 1.0), ratio=(0.1, 10.0))
    boxes = draws_of(ViewSpec((view,)), 200, height=1000, width=1250)[0].box_B4
    assert (boxes == [0, 0, 1000, 1250]).all(axis=1).mean() > 0.9


# --- photometry -------------------------------------------------------------------------------------------------------


def test_coins_fall_with_their_probabilities():
    view = View(8, jitter_p=0.8, gray_p=0.2, blur_p=0.5, solarize_p=0.1, flip_p=0.3, blur_sigma=(0.1, 0.5))
    num = 20_000
    d = draws_of(ViewSpec((view,)), num)[0]
    coins = {"jitter_p": d.jitter_B, "gray_p": d.gray_B, "blur_p": d.sigma_B > 0, "solarize_p": d.solarize_B}
    coins["flip_p"] = d.flip_B
    for name, coin in coins.items():
        p = getattr(view, name)
        assert abs(coin.mean() - p) < 5 * np.sqrt(p * (1 - p) / num), name
    correlation = np.corrcoef(np.stack(list(coins.values())).astype(float)) - np.eye(len(coins))
    assert np.abs(correlation).max() < 5 / np.sqrt(num)


@pytest.mark.parametrize(("p", "always"), [(0.0, False), (1.0, True)])
def test_certain_coins_are_certain(p, always):
    view = View(32, jitter_p=p, gray_p=p, blur_p=p, solarize_p=p, flip_p=p)
    d = draws_of(ViewSpec((view,)), 1000)[0]
    for coin in (d.jitter_B, d.gray_B, d.sigma_B > 0, d.solarize_B, d.flip_B):
        assert (coin == always).all()


def test_all_orders_are_equally_likely():
    num = 24_000
    orders = draws_of(simsiam(1), num)[0].order_B4
    assert (np.sort(orders, axis=1) == np.arange(4)).all() and orders.dtype == np.int64
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == len(ORDERS) == 24
    assert ((counts - num / 24) ** 2 / (num / 24)).sum() < 23 + 6 * np.sqrt(2 * 23)


def test_factors_and_sigma_are_uniform_in_colorjitters_ranges():
    num = 20_000
    view = View(32, brightness=0.4, contrast=1.5, saturation=0.8, hue=0.1, blur_p=1.0, blur_sigma=(0.1, 2.0))
    d = draws_of(ViewSpec((view,)), num)[0]
    ranges = [(0.6, 1.4), (0.0, 2.5), (0.2, 1.8), (-0.1, 0.1), (0.1, 2.0)]  # 1 - 1.5 is cut at 0
    for values, (low, high) in zip([*d.factor_B4.T, d.sigma_B], ranges, strict=True):
        assert low - 1e-6 <= values.min() and values.max() <= high + 1e-6
        assert_distributed_alike(values, np.linspace(low, high, num))
    assert d.factor_B4.dtype == d.sigma_B.dtype == np.float32
    assert np.abs(np.corrcoef(np.stack([*d.factor_B4.T, d.sigma_B])) - np.eye(5)).max() < 5 / np.sqrt(num)


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (256, 256), (301, 300), (1, 1), (1, 9)])
def test_evaluation_views_are_the_centre_without_chance(height, width):
    a, b = (draws_of(evaluation(224), 3, height=height, width=width, seed=s, epoch=s)[0] for s in (0, 1))
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert not (a.flip_B | a.jitter_B | a.gray_B | a.solarize_B | (a.sigma_B > 0)).any()
    top, left, h, w = a.box_B4[0].tolist()
    assert h == w == max(1, round(0.875 * min(height, width)))
    pixels = torch.arange(height * width).reshape(1, height, width)
    assert torch.equal(pixels[:, top : top + h, left : left + w], TF.center_crop(pixels, [h, w]))


# --- permutation ------------------------------------------------------------------------------------------------------


@given(n=st.integers(0, 300), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 2**32 - 1))
def test_a_permutation_has_everything_once(n, seed, epoch):
    perm = permutation(n, seed=seed, epoch=epoch)
    assert perm.dtype == np.int64
    np.testing.assert_array_equal(np.sort(perm), np.arange(n))


def test_permutations_are_uniform():
    perms = np.array([permutation(4, seed=1, epoch=epoch) for epoch in range(4800)])
    _, counts = np.unique(perms, axis=0, return_counts=True)
    assert len(counts) == 24 and ((counts - 200) ** 2 / 200).sum() < 23 + 6 * np.sqrt(2 * 23)
