"""Combinatorial patches: what each variant asks of the loader, shows the network, and predicts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import TinyResNet
from torch import Tensor, nn

import loaders
from fastssl.losses import patches
from fastssl.losses.ops import Owner, combine, divide, others
from fastssl.losses.pairs import PairConfig
from fastssl.losses.patches import Patches, patch_views
from fastssl.methods import byol, fastmoco, fastsiam, simsiam
from fastssl.networks.batch_norm import group_batch_norm
from loaders import Batch, UserError
from loaders.views import RECIPES

SPEC = RECIPES["fastmoco"](2, 224)

# Variant: sizes of what is drawn after the two views, the network's passes (times B rows, height, width), M.
VARIANTS = {
    "off": ([], [(2, 224, 224)], 2),
    "divide-encode-combine": ([], [(8, 112, 112)], 12),
    "divide-combine-encode": ([], [(4, 224, 112)], 4),
    "encode": ([158] * 4, [(4, 158, 158)], 4),
    "sample-combine-encode": ([224] * 4, [(2, 112, 224), (2, 224, 112)], 4),
    "sample-encode-combine": ([112] * 8, [(8, 112, 112)], 28),
    "montage": ([], [(1, 224, 224)] * 2, 28),
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)


class Watched(TinyResNet):
    """Remembers the shapes that it is given, also where its map of features is asked for."""

    def __init__(self):
        super().__init__()
        self.seen: list[torch.Size] = []
        group_batch_norm(self)  # as in a run: all views in one pass
        self.conv1.register_forward_hook(lambda _m, inputs, _o: self.seen.append(inputs[0].shape))


def batch_for(spec: loaders.ViewSpec, B: int = 2) -> Batch:
    views = [torch.randn(B, 3, s, s).contiguous(memory_format=torch.channels_last) for s in spec.sizes]
    return Batch(views, None, torch.arange(B), torch.zeros(B))


class Mean(nn.Module):
    """A backbone that is linear: the mean of each channel."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class Predictions(NamedTuple):
    p_MBD: Tensor
    z_TBD: Tensor | None
    owner_M: list[Owner]


def predict(
    batch: Batch, options: Patches, f: nn.Module | None = None, g: nn.Module | None = None, h: nn.Module | None = None
) -> Predictions:
    """What is predicted of a batch. Without f, g, h: means of channels, left as they are by both heads."""
    steps = PairConfig(**dataclasses.asdict(options)).steps()
    z = steps.project(g or nn.Identity(), steps.encode(f or Mean(), batch))
    p_MBD, owner_M = steps.predict(h or nn.Identity(), z), steps.owners(z)
    assert len(owner_M) == len(p_MBD)
    return Predictions(p_MBD, z if isinstance(z, Tensor) else None, owner_M)


def batch_of(options: Patches, size: int, B: int = 3) -> Batch:
    """What these patches ask of the loader, of two views."""
    return batch_for(patch_views(RECIPES["imagenet"](2, size), options), B)


# ------------------------------------------------------------------ every variant


@each_variant
def test_what_is_drawn_seen_and_predicted(variant: str) -> None:
    """The numbers of predictions are those of the paper's table: 12, 4, 4, 4, 28, 28.

    A crop of half the pixels covers half the area; rectangles are cut from crops as large as a view.
    """
    drawn, seen, M = VARIANTS[variant]
    options = Patches(patches=variant)
    options.validate()
    spec = patch_views(SPEC, options)
    assert spec.sizes == (224, 224, *drawn)
    assert spec.views[:2] == SPEC.views
    share = {"encode": 1 / 2, "sample-encode-combine": 1 / 4}.get(variant, 1)
    for crop in spec.views[2:]:
        assert crop.scale == pytest.approx((0.2 * share, 1.0 * share))
        assert dataclasses.replace(crop, size=224, scale=(0.2, 1.0)) == SPEC.views[0]
    assert spec.divide == (2 if variant == "divide-encode-combine" else 1)
    f, batch = Watched(), batch_for(spec)
    online = predict(batch, options, f, nn.Linear(64, 16), nn.Linear(16, 8))
    assert f.seen == [(2 * n, 3, height, width) for n, height, width in seen]
    assert online.p_MBD.shape == (M, 2, 8)
    assert (online.z_TBD is None) == (variant != "off")
    assert len(options.target_views(batch.views)) == 2
    owned = variant in ("off", "divide-encode-combine", "divide-combine-encode")
    assert online.owner_M == ([0] * (M // 2) + [1] * (M // 2) if owned else [None] * M)
    assert options.owned == owned
    # Predictions of a view meet the other one, all others meet both.
    w = torch.tensor(others(online.owner_M, 2))
    assert int((w > 0).sum()) == (M if owned else 2 * M)
    assert torch.allclose(w[w > 0], 1 / (w > 0).sum())


@each_variant
def test_extra_crops_come_last_whole_and_predict_all_targets(variant: str) -> None:
    plain, options = Patches(patches=variant), Patches(patches=variant, extra_crops=2, extra_size=96)
    spec = patch_views(SPEC, options)
    assert spec.sizes == (*patch_views(SPEC, plain).sizes, 96, 96)
    assert spec.divide == 1  # the loader would cut the crops, too
    assert patch_views(SPEC, Patches(patches=variant, extra_crops=1)).sizes[-1] == 224
    f, batch = Watched(), batch_for(spec)
    found = predict(batch, options, f)
    assert f.seen[-1] == (4, 3, 96, 96)
    assert found.owner_M[-2:] == [None, None] and not options.owned
    assert len(found.owner_M) == VARIANTS[variant][2] + 2 == len(found.p_MBD)
    torch.testing.assert_close(found.p_MBD[-1], f(batch.views[-1]))
    assert [x is y for x, y in zip(options.target_views(batch.views), batch.views[:2], strict=True)] == [True] * 2


@each_variant
def test_owners_are_right(variant: str) -> None:
    """A prediction changes with the view that it belongs to, and with no other."""
    options, f = Patches(patches=variant), TinyResNet().eval()
    batch = batch_of(options, 64, 5)
    before = predict(batch, options, f)
    for view in (0, 1):
        views = list(batch.views)
        views[view] = torch.randn_like(views[view])
        after = predict(dataclasses.replace(batch, views=views), options, f)
        changed = [not torch.allclose(p, q, atol=1e-6) for p, q in zip(before.p_MBD, after.p_MBD, strict=True)]
        if options.owned:
            assert changed == [owner == view for owner in before.owner_M]
        else:  # what is drawn apart changes with neither; montage's combinations have tiles of one view or of both
            assert sum(changed) == (28 - 6 if variant == "montage" else 0)


@pytest.mark.parametrize(
    ("variant", "n", "m", "num", "M"),
    [
        ("divide-encode-combine", 1, 1, None, 2),
        ("divide-encode-combine", 2, 3, None, 8),
        ("divide-encode-combine", 2, 2, 2, 4),
        ("divide-encode-combine", 3, 2, 9, 18),
        ("encode", 2, 4, None, 2),
        ("encode", 2, 1, None, 8),
        ("encode", 3, 9, None, 2),
        ("sample-encode-combine", 2, 2, 12, 12),
        ("sample-encode-combine", 1, 2, None, 1),
        ("montage", 2, 2, 4, 4),
        ("montage", 3, 1, None, 18),
    ],
)
def test_numbers_of_other_tilings(variant: str, n: int, m: int, num: int | None, M: int) -> None:
    options = Patches(patches=variant, divide=n, combine=m, pairs=num)
    options.validate()
    assert len(predict(batch_of(options, 96), options, TinyResNet()).p_MBD) == M


# ------------------------------------------------------------------ tiles


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 4), B=st.integers(1, 3), height=st.integers(1, 3), width=st.integers(1, 3))
def test_joining_undoes_dividing(n: int, B: int, height: int, width: int) -> None:
    x = torch.randn(B, 3, n * height, n * width)
    assert torch.equal(patches._join(divide(x, n).unflatten(0, (n * n, B)), n), x)


def test_the_loaders_tiles_are_those_of_the_views(beton: Path) -> None:
    options = Patches(patches="divide-encode-combine")
    spec = patch_views(RECIPES["fastmoco"](2, 32), options)
    with loaders.open(beton, spec, batch_size=8) as loader:
        batch = next(iter(loader.epoch(0)))
        assert batch.tiles is not None
        f = TinyResNet()
        given, cut = (predict(b, options, f).p_MBD for b in (batch, dataclasses.replace(batch, tiles=None)))
        torch.testing.assert_close(given, cut, rtol=0, atol=0)
        wrong = dataclasses.replace(batch, tiles=[t.flip(0) for t in batch.tiles])
        assert not torch.allclose(predict(wrong, options, f).p_MBD, given)  # they are what is used


def halves(x: Tensor, upright: bool) -> list[Tensor]:
    """Left and right, or upper and lower ones."""
    return list(x.chunk(2, dim=3 if upright else 2))


@pytest.mark.parametrize(
    "variant", ["divide-combine-encode", "sample-combine-encode", "encode", "sample-encode-combine"]
)
def test_what_is_encoded(variant: str) -> None:
    """Both upright halves of a view; halves of drawn crops that lie and stand in turn; whole crops, alone or combined.

    Means of channels are what the patches contain. Halves of one shape are encoded in one pass, and follow each other.
    """
    options = Patches(patches=variant)
    batch = batch_of(options, 16)
    crops = batch.views[2:]
    if variant == "divide-combine-encode":
        expected = [half for x in batch.views for half in halves(x, upright=True)]
    elif variant == "sample-combine-encode":
        expected = [halves(crops[i], upright)[0] for upright, of in ((False, (0, 2)), (True, (1, 3))) for i in of]
    else:
        expected = crops
    means = torch.stack([x.mean((2, 3)) for x in expected])
    if variant == "sample-encode-combine":
        means = combine(means, 2)
    torch.testing.assert_close(predict(batch, options).p_MBD, means)


# ------------------------------------------------------------------ montage


@pytest.mark.parametrize("n", [2, 3])
def test_montage_mixes_images_and_features_find_their_place(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pixel is 100 image + cell: a montage has no two cells of one image, each at its own cell, and the feature
    of image b and tile c is made of nothing else."""
    B, side = 11, 4 * n
    image = torch.arange(B).view(B, 1, 1, 1)
    cell = divide(torch.zeros(1, 1, side, side), n)
    cell = patches._join((cell + torch.arange(n * n).view(-1, 1, 1, 1)).unflatten(0, (n * n, 1)), n)
    x = (100.0 * image + cell).expand(B, 3, side, side)
    seen: list[Tensor] = []

    def keep(_f: nn.Module, x: Tensor) -> Tensor:
        seen.append(x)
        return x

    monkeypatch.setattr(patches, "feature_map", keep)
    h = patches._montage(nn.Identity(), x, n)
    expected = 100.0 * torch.arange(B) + torch.arange(n * n)[:, None]
    assert torch.equal(h, expected[..., None].expand(n * n, B, 3))
    for montage in seen[0]:
        cells = [tile.unique() for tile in divide(montage[None], n)]
        assert all(len(values) == 1 for values in cells)  # nothing is cut in two
        assert [int(v) % 100 for v in cells] == list(range(n * n))
        assert len({int(v) // 100 for v in cells}) == n * n


def test_montage_through_a_network_uses_its_map() -> None:
    """Features of one tile alone, from a network whose map at a place sees nothing but the stride's own pixels."""

    class Blocks(TinyResNet):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, 64, 8, stride=8)
            self.bn1 = self.relu = self.maxpool = self.layer1 = self.layer2 = self.layer3 = self.layer4 = nn.Identity()

    f, options = Blocks(), Patches(patches="montage", combine=1)
    batch = batch_of(options, 32, 6)
    found = predict(batch, options, f).p_MBD
    expected = torch.cat([f(divide(x, 2)).unflatten(0, (4, 6)) for x in batch.views])
    torch.testing.assert_close(found, expected)


def test_montage_of_an_odd_map_shares_the_middle() -> None:
    """7 x 7 places at 224 px: both halves have four rows."""
    f, options = TinyResNet().eval(), Patches(patches="montage", combine=1)
    x = torch.randn(1, 3, 224, 224)
    found = predict(Batch([x, x], None, torch.arange(1), torch.zeros(1)), options, f).p_MBD
    places = patches.feature_map(f, x)
    assert places.shape[2:] == (7, 7)
    for c, (i, j) in enumerate([(0, 0), (3, 0), (0, 3), (3, 3)]):  # alone in its batch, an image is its own montage
        torch.testing.assert_close(found[c], places[:, :, i : i + 4, j : j + 4].mean((2, 3)))


# ------------------------------------------------------------------ where and how features are combined


@pytest.mark.parametrize(
    ("after", "by", "weight"),
    [("backbone", "mean", 0.5), ("projector", "max", 0.5), ("predictor", "weighted", 0.8), ("projector", "mean", 0.5)],
)
def test_where_and_how_features_are_combined(after: str, by: str, weight: float) -> None:
    f, g, h = TinyResNet(), nn.Sequential(nn.Linear(64, 16), nn.ReLU()), nn.Sequential(nn.Linear(16, 8), nn.ReLU())
    options = Patches(patches="divide-encode-combine", combine_after=after, combine_by=by, combine_weight=weight)
    batch = batch_of(options, 64)
    expected = []
    for view in batch.views:
        x = f(divide(view, 2)).unflatten(0, (4, 3))
        for place, head in (("backbone", g), ("projector", h), ("predictor", nn.Identity())):
            x = head(combine(x, 2, by=by, weight=weight) if place == after else x)
        expected.append(x)
    torch.testing.assert_close(predict(batch, options, f, g, h).p_MBD, torch.cat(expected))


def test_beta_draws_shares_anew() -> None:
    options = Patches(patches="divide-encode-combine", combine_by="beta", combine_weight=1.0)
    batch = batch_of(options, 16)
    assert not torch.allclose(predict(batch, options).p_MBD, predict(batch, options).p_MBD)


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({"divide": 0}, "--divide 0"),
        ({"extra_crops": -1}, "--extra-crops -1"),
        ({"combine_weight": 0.0}, "--combine-weight 0.0"),
        ({"combine_by": "weighted", "combine_weight": 1.0}, "--combine-weight 1.0"),
        ({"patches": "divide-combine-encode", "divide": 3}, "--divide 2 --combine 2"),
        ({"patches": "divide-combine-encode", "combine": 1}, "--divide 2 --combine 2"),
        ({"patches": "sample-combine-encode", "combine": 4}, "--divide 2 --combine 2"),
        ({"patches": "encode", "combine": 3}, "--combine 3"),
        ({"patches": "encode", "combine": 0}, "--combine 0"),
        ({"patches": "encode", "combine": -2}, "--combine -2"),
        ({"patches": "encode", "combine": 8}, "--combine 8"),
        ({"patches": "divide-encode-combine", "combine": 5}, "--divide 2 --combine 5 .*1 to 4"),
        ({"patches": "divide-encode-combine", "combine": 0}, "--combine 0"),
        ({"patches": "divide-encode-combine", "pairs": 3}, "--pairs 3: .*choose 2, 4, 6"),
        ({"patches": "sample-encode-combine", "combine": 9}, "--combine 9 .*1 to 8"),
        ({"patches": "montage", "pairs": 6}, "--pairs 6: .*8 tiles equally often"),
        ({"patches": "encode", "pairs": 2}, "--pairs 2"),
        ({"patches": "divide-combine-encode", "pairs": 2}, "--pairs 2"),
        ({"patches": "off", "pairs": 2}, "--pairs 2"),
    ],
)
def test_options_that_do_not_fit_name_their_flags(options: dict, flags: str) -> None:
    with pytest.raises(UserError, match=flags):
        Patches(**options).validate()


@pytest.mark.parametrize(
    ("variant", "n", "size", "fits"),
    [
        ("divide-encode-combine", 3, 224, False),
        ("divide-combine-encode", 2, 33, False),
        ("montage", 3, 32, False),
        ("sample-encode-combine", 3, 224, False),
        ("divide-encode-combine", 3, 225, True),
        ("encode", 3, 224, True),
        ("off", 3, 224, True),
    ],
)
def test_views_that_do_not_divide_are_refused(variant: str, n: int, size: int, fits: bool) -> None:
    spec, options = RECIPES["imagenet"](2, size), Patches(patches=variant, divide=n)
    if fits:
        patch_views(spec, options)
    else:
        with pytest.raises(UserError, match=f"--size {size}.*{n} tiles.*--divide.*multiple of {n}"):
            patch_views(spec, options)


@pytest.mark.parametrize("variant", ["encode", "sample-combine-encode", "sample-encode-combine", "montage"])
def test_drawn_crops_are_for_two_views(variant: str) -> None:
    with pytest.raises(UserError, match=f"--patches {variant} is for methods with two views"):
        fastsiam.Config(num_views=4, patches=variant).validate()
    spec = fastsiam.Config(num_views=2, patches=variant).views(lambda K: RECIPES["imagenet"](K, 64))
    assert len(spec.views) == 2 + Patches(patches=variant).num_drawn


@pytest.mark.parametrize("module", [simsiam, byol, fastmoco])
@pytest.mark.parametrize("options", [{"patches": "encode"}, {"patches": "montage"}, {"target_view": "same"}])
def test_guided_stop_gradient_needs_predictions_of_the_views(module, options: dict) -> None:
    with pytest.raises(UserError, match="--guided guided"):
        module.Config(guided="guided", guided_views=2, **options).validate()
    with pytest.raises(UserError, match=r"--guided random.*--extra-crops"):
        module.Config(guided="random", extra_crops=1).validate()
    for variant in ("off", "divide-encode-combine", "divide-combine-encode"):
        module.Config(guided="guided", patches=variant).validate()
