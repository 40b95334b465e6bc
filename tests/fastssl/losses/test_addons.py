"""Pair weights of guided stop-gradient against a loop over images, and of re-balanced multi-crop against its tables."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastssl.losses import guided as addons
from fastssl.losses.guided import (
    Guided,
    closest_views,
    draw_partners,
    guide,
    guide_mean,
    guided_weights,
    guided_weights_4,
    spread,
)
from fastssl.losses.multicrop import MultiCrop, rebalanced_weights
from loaders import UserError, views

CPU = torch.device("cpu")
quick = settings(deadline=None, max_examples=30)
SEEDS = st.integers(0, 2**16)


def drawn(B: int, K: int, seed: int, D: int = 3) -> tuple[Tensor, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(K, B, D, generator=generator), torch.randperm(B, generator=generator).tolist()


def closest(z_KD: Tensor, other_KD: Tensor, mode: str) -> tuple[int, int]:
    """The place of the smallest distance among d11,21 d11,22 d12,21 d12,22, or the one opposite (3 - k)."""
    d = [sum((z - o) ** 2).sqrt().item() for z in z_KD for o in other_KD]
    k = d.index(min(d))
    return divmod(k if mode == "guided" else len(d) - 1 - k, len(other_KD))


# ------------------------------------------------------------------ guided stop-gradient


@quick
@given(B=st.integers(1, 9), seed=SEEDS, mode=st.sampled_from(["guided", "reversed"]))
def test_pairs_of_views_against_a_loop_over_images(B: int, seed: int, mode: str) -> None:
    """Of four views, row b: 1/2 D(p_1a, z_1a') + 1/2 D(p_2c, z_2c'), where image 2 is r(b) and has views 2 and 3."""
    z, partner = drawn(B, 4, seed)
    two, four = torch.zeros(2, 2, B), torch.zeros(4, 4, B)
    for b, r in enumerate(partner):
        a, _ = closest(z[:2, b], z[:2, r], mode)
        two[a, 1 - a, b] = 1
        a, c = closest(z[:2, b], z[2:, r], mode)
        four[a, 1 - a, b] += 0.5
        four[2 + c, 3 - c, r] += 0.5
    assert torch.equal(guided_weights(z[:2], torch.tensor(partner), mode), two)
    assert torch.equal(guided_weights_4(z, torch.tensor(partner), mode), four)


@quick
@given(B=st.integers(1, 7), K=st.integers(2, 5), seed=SEEDS, mode=st.sampled_from(["guided", "reversed"]))
def test_mean_targets_against_a_loop_over_images(B: int, K: int, seed: int, mode: str) -> None:
    z, partner = drawn(B, K, seed)
    expected = torch.zeros(K, K, B)
    for b, r in enumerate(partner):
        a, _ = closest(z[:, b], z[:, r], "guided")
        for i in range(K):  # reversed: all but the closest one predict
            expected[i, i, b] = float(i == a) if mode == "guided" else float(i != a) / (K - 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(addons, "draw_partners", lambda *_: torch.tensor(partner))
        torch.testing.assert_close(guide_mean(z, Guided(guided=mode)), expected)


def test_the_first_of_equal_distances_wins() -> None:
    """On a line, all sixteen orders of two views at 0 or 1 beside a partner's at 0 or 1."""
    for z1, z2, o1, o2 in itertools.product((0.0, 1.0), repeat=4):
        z, other = torch.tensor([[[z1]], [[z2]]]), torch.tensor([[[o1]], [[o2]]])
        d = [abs(z1 - o1), abs(z1 - o2), abs(z2 - o1), abs(z2 - o2)]
        first = d.index(min(d))
        for mode, k in (("guided", first), ("reversed", 3 - first)):
            a, c = closest_views(z, other, mode)
            assert (a.item(), c.item()) == divmod(k, 2)


def test_half_precision_compares_in_full() -> None:
    z = torch.randn(2, 64, 256).bfloat16()
    other = torch.randn(2, 64, 256).bfloat16()
    for found, expected in zip(closest_views(z, other), closest_views(z.float(), other.float()), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("num_views", [2, 4])
@pytest.mark.parametrize("mode", ["guided", "random", "reversed"])
def test_every_image_has_one_direction_of_a_pair_and_weight_one(mode: str, num_views: int) -> None:
    z = torch.randn(num_views, 32, 5)
    w = guide(z, Guided(guided=mode, guided_views=num_views))
    assert w.shape == (num_views, num_views, 32) and w.dtype == torch.float32
    assert torch.equal(w.sum((0, 1)), torch.ones(32))
    for b in range(32):
        for first in range(0, num_views, 2):
            pair = w[first : first + 2, first : first + 2, b]
            assert sorted(pair.flatten().tolist()) == [0, 0, 0, 2 / num_views]
            assert pair.trace() == 0
    assert set((w > 0).nonzero()[:, 0].tolist()) == set(range(num_views))  # over 32 images, every view predicts once


def test_random_selection_is_uniform_and_ignores_distances() -> None:
    """Four places with 1/4 each: 4.4 standard deviations of 20000 draws are 0.0135."""
    z = torch.zeros(2, 20_000, 1)
    z[1] = 100  # "guided" would always choose view 0
    a, c = closest_views(z, torch.zeros_like(z), "random")
    share = torch.bincount(2 * a + c, minlength=4) / 20_000
    assert (share - 0.25).abs().max() < 0.0135
    w = guided_weights(z, torch.arange(20_000), "random")
    assert abs(w[0, 1].mean() - 0.5) < 0.0157 and abs(w[1, 0].mean() - 0.5) < 0.0157
    K = 5
    a, c = closest_views(torch.zeros(K, 20_000, 1), torch.zeros(K, 20_000, 1), "random")
    assert (torch.bincount(a, minlength=K) / 20_000 - 1 / K).abs().max() < 0.0125


@pytest.mark.parametrize("fixed_points", [True, False])
@pytest.mark.parametrize("B", [2, 3, 8])
def test_partners_are_a_permutation_with_uniform_chances(B: int, fixed_points: bool) -> None:
    draws = torch.stack([draw_partners(B, fixed_points, CPU) for _ in range(4000)])
    assert torch.equal(draws.sort(dim=1).values, torch.arange(B).expand(4000, B))
    chance = torch.stack([(draws == i).float().mean(0) for i in range(B)])
    expected = torch.full((B, B), 1 / B) if fixed_points else (1 - torch.eye(B)) / (B - 1)
    assert (chance - expected).abs().max() < 0.04  # 4.9 standard deviations
    if fixed_points:  # one per batch is expected, whatever its size
        assert abs((draws == torch.arange(B)).sum(1).float().mean() - 1) < 0.08


def test_a_batch_of_one_is_its_own_partner() -> None:
    assert draw_partners(1, True, CPU).tolist() == draw_partners(1, False, CPU).tolist() == [0]


def test_guide_draws_partners_as_the_options_say(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(addons, "draw_partners", lambda *args: asked.append(args) or torch.arange(6))
    for fixed_points in (True, False):
        guide(torch.randn(2, 6, 3), Guided(guided="guided", fixed_points=fixed_points))
        guide_mean(torch.randn(3, 6, 3), Guided(guided="guided", fixed_points=fixed_points))
    assert asked == [(6, True, CPU)] * 2 + [(6, False, CPU)] * 2


def test_weights_carry_no_gradient() -> None:
    for K in (2, 4):
        z = torch.randn(K, 6, 5, requires_grad=True)
        for mode in ("guided", "random", "reversed"):
            assert not guide(z, Guided(guided=mode)).requires_grad
            assert not guide_mean(z, Guided(guided=mode)).requires_grad


def test_predictions_of_a_view_share_its_weight() -> None:
    w = torch.rand(2, 2, 5)
    found = spread(w, [0, 0, 0, 1])
    torch.testing.assert_close(found, torch.stack([w[0] / 3, w[0] / 3, w[0] / 3, w[1]]))
    torch.testing.assert_close(found.sum(0), w.sum(0))


def test_number_of_views() -> None:
    assert Guided().num_guided_views == 2
    assert Guided(guided="guided").num_guided_views == 4
    assert Guided(guided="random", guided_views=2).num_guided_views == 2


# ------------------------------------------------------------------ re-balanced multi-crop


@quick
@given(L=st.integers(1, 12), alpha=st.floats(0, 1), num_targets=st.sampled_from([1, 2]))
def test_weights_are_alpha_of_one_mean_and_the_rest_of_the_other(L: int, alpha: float, num_targets: int) -> None:
    """DINO, SwAV: P_gg = 2, P_gl = 2L; MoCo, with keys of view 0 alone: P_gg = 1, P_gl = L."""
    w = torch.tensor(rebalanced_weights(2 + L, num_targets, alpha), dtype=torch.float64)
    assert w.shape == (2 + L, num_targets)
    for j in range(num_targets):
        assert w[j, j] == 0
        assert w[1 - j, j] == pytest.approx(alpha / num_targets)
        for i in range(2, 2 + L):
            assert w[i, j] == pytest.approx((1 - alpha) / (num_targets * L))
    if num_targets == 1:
        assert w[0, 0] == 0
    assert w.sum() == pytest.approx(1)


@pytest.mark.parametrize("num_targets", [1, 2])
@pytest.mark.parametrize(("L", "printed"), [(6, 0.142857), (10, 0.090909)])
def test_the_printed_alphas_weigh_all_pairs_alike(L: int, printed: float, num_targets: int) -> None:
    plain = torch.tensor(rebalanced_weights(2 + L, num_targets, None))
    pairs = num_targets * (1 + L)
    torch.testing.assert_close(plain[plain > 0], torch.full((pairs,), 1 / pairs))
    torch.testing.assert_close(torch.tensor(rebalanced_weights(2 + L, num_targets, printed)), plain, rtol=0, atol=1e-6)
    exact = torch.tensor(rebalanced_weights(2 + L, num_targets, 1 / (1 + L)))
    torch.testing.assert_close(exact, plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("alpha", [None, 0.0, 0.4, 1.0])
def test_without_small_views_alpha_changes_nothing(alpha: float | None) -> None:
    assert rebalanced_weights(2, 2, alpha) == [[0, 0.5], [0.5, 0]]
    assert rebalanced_weights(2, 1, alpha) == [[0], [1]]


def test_small_views_come_after_the_large_ones() -> None:
    spec = views.byol(224)
    found = MultiCrop(num_local=6, local_size=128, local_scale=(0.05, 0.3)).views(lambda _: spec)
    assert found.views[:2] == spec.views
    assert found.sizes == (224, 224) + (128,) * 6
    assert {v.scale for v in found.views[2:]} == {(0.05, 0.3)}
    assert {v.blur_p for v in found.views[2:]} == {0.5} and {v.solarize_p for v in found.views[2:]} == {0.0}
    assert MultiCrop().views(lambda _: spec) == spec


@pytest.mark.parametrize(
    ("options", "flag"),
    [({"num_local": -1}, "--num-local -1"), *(({"alpha": x}, f"--alpha {x}") for x in (-0.1, 1.1, math.nan))],
)
def test_bad_values_name_their_flag(options: dict, flag: str) -> None:
    with pytest.raises(UserError, match=flag):
        MultiCrop(**options).validate()
    MultiCrop(num_local=3, alpha=1.0).validate()
    MultiCrop(alpha=0.0).validate()
