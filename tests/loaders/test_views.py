"""View specifications: the recipes are the papers', and what cannot be made is refused with a remedy."""

import dataclasses

import pytest

from loaders.errors import UserError
from loaders.views import IMAGENET_MEAN, View, ViewSpec, byol, cifar, evaluation, multicrop, simsiam


def jitter(view):
    return view.brightness, view.contrast, view.saturation, view.hue, view.jitter_p


def test_simsiam_is_moco_v2():
    spec = simsiam(4, 192)
    assert spec.K == 4 and spec.sizes == (192,) * 4 and len(set(spec.views)) == 1
    view = spec.views[0]
    assert view.scale == (0.2, 1.0) and view.interpolation == "bilinear"
    assert jitter(view) == (0.4, 0.4, 0.4, 0.1, 0.8)
    assert (view.gray_p, view.blur_p, view.blur_sigma, view.solarize_p, view.flip_p) == (0.2, 0.5, (0.1, 2.0), 0, 0.5)
    assert spec.mean == IMAGENET_MEAN and spec.divide == 1
    fast_moco = simsiam(2, 224, interpolation="bicubic", divide=2)
    assert fast_moco.divide == 2 and fast_moco.views[0].interpolation == "bicubic"


def test_byol_is_asymmetric():
    first, second = byol(224).views
    assert jitter(first) == jitter(second) == (0.4, 0.4, 0.2, 0.1, 0.8)
    assert (first.blur_p, second.blur_p) == (1.0, 0.1)
    assert (first.solarize_p, second.solarize_p) == (0.0, 0.2)
    assert first.scale == second.scale == (0.08, 1.0)
    assert [view.blur_p for view in byol(32, blur=False).views] == [0, 0]


def test_multicrop_puts_large_views_first():
    spec = multicrop(224, 96, num_global=2, num_local=6)
    assert spec.sizes == (224,) * 2 + (96,) * 6
    assert [view.scale for view in spec.views] == [(0.14, 1.0)] * 2 + [(0.05, 0.14)] * 6
    assert [view.blur_p for view in spec.views] == [1.0, 0.1] + [0.5] * 6
    assert [view.solarize_p for view in spec.views] == [0, 0.2] + [0] * 6


def test_multicrop_with_swavs_photometry():
    spec = multicrop(photometry="swav")
    assert {jitter(view) for view in spec.views} == {(0.8, 0.8, 0.8, 0.2, 0.8)}
    assert {(view.blur_p, view.solarize_p) for view in spec.views} == {(0.5, 0.0)}


def test_cifar_has_no_blur():
    view = cifar(2).views[0]
    assert view.size == 32 and view.scale == (0.08, 1.0) and view.blur_p == 0 and view.gray_p == 0.2
    assert jitter(view) == (0.4, 0.4, 0.4, 0.1, 0.8)
    spec = multicrop(32, 18, global_scale=(0.2, 1.0), local_scale=(0.08, 0.5), blur=False)
    assert spec.sizes == (32, 32) + (18,) * 6 and all(view.blur_radius == 0 for view in spec.views)


def test_evaluation_is_the_centre():
    (view,) = evaluation(224).views
    assert view.center == 0.875 and view.flip_p == view.jitter_p == 0


def test_views_are_values():
    assert simsiam(2, 64) == simsiam(2, 64) and hash(simsiam(2, 64)) == hash(simsiam(2, 64))
    assert ViewSpec([View(8)]).views == (View(8),)
    with pytest.raises(dataclasses.FrozenInstanceError):
        View(8).size = 9


def test_blur_radius_is_three_sigma():
    assert View(32, blur_p=0.5).blur_radius == 6
    assert View(32, blur_p=0.5, blur_sigma=(0.1, 2.1)).blur_radius == 7
    assert View(32).blur_radius == 0 and ViewSpec((View(6),)).sizes == (6,)


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        ({"size": 0}, "size"),
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"scale": (0.5, 0.2)}, "scale"),
        ({"scale": (0.5, 1.2)}, "scale"),
        ({"ratio": (0.0, 1.0)}, "ratio"),
        ({"ratio": (2.0, 1.0)}, "ratio"),
        ({"interpolation": "nearest"}, "bilinear, bicubic"),
        ({"brightness": -0.1}, "brightness"),
        ({"contrast": float("nan")}, "contrast"),
        ({"saturation": float("inf")}, "saturation"),
        ({"hue": 0.6}, "hue"),
        ({"jitter_p": 1.1}, "jitter_p"),
        ({"gray_p": -0.1}, "gray_p"),
        ({"blur_p": 2}, "blur_p"),
        ({"solarize_p": 2}, "solarize_p"),
        ({"flip_p": float("nan")}, "flip_p"),
        ({"blur_sigma": (0.0, 1.0)}, "blur_sigma"),
        ({"blur_sigma": (2.0, 1.0)}, "blur_sigma"),
        ({"size": 6, "blur_p": 0.5}, "blur_sigma"),
        ({"center": 0.0}, "center"),
        ({"center": 1.5}, "center"),
    ],
)
def test_a_view_that_cannot_be_made_is_refused(wrong, names):
    with pytest.raises(UserError, match=names):
        ViewSpec((View(**{"size": 32} | wrong),))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: ViewSpec(()), "no views"),
        (lambda: simsiam(0), "no views"),
        (lambda: simsiam(2, 225, divide=2), "225 px does not divide"),
        (lambda: simsiam(2, 224, divide=0), "divide"),
        (lambda: ViewSpec((View(8),), std=(1.0, 1.0, 0.0)), "std"),
        (lambda: ViewSpec((View(8),), mean=(0.5,)), "mean"),
        (lambda: multicrop(photometry="none"), "dino, swav"),
        (lambda: multicrop(num_global=0), "global"),
        (lambda: evaluation(224, 0), "center"),
    ],
)
def test_a_specification_that_cannot_be_made_is_refused(make, names):
    with pytest.raises(UserError, match=names):
        make()
