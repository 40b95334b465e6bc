"""fastssl.ops: the pure functions against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl.ops import divide, feature_std, mean_of_others, negative_cosine


@settings(deadline=None, max_examples=30)
@given(K=st.integers(2, 8), B=st.integers(1, 5), D=st.integers(1, 16), seed=st.integers(0, 2**16))
def test_mean_of_others_is_the_mean_of_the_others(K: int, B: int, D: int, seed: int) -> None:
    z = torch.randn(K, B, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = torch.stack([torch.stack([z[j] for j in range(K) if j != i]).mean(0) for i in range(K)])
    torch.testing.assert_close(mean_of_others(z), expected)


def test_mean_of_others_of_two_views_is_exactly_the_other_one() -> None:
    z = torch.randn(2, 7, 5) * torch.tensor([1e6, 1e-6])[:, None, None]
    assert torch.equal(mean_of_others(z), torch.stack([z[1], z[0]]))


def test_mean_of_others_is_not_the_mean_of_normalised_outputs() -> None:
    z = torch.randn(4, 8, 16) * torch.rand(4, 8, 1).mul(10)
    raw = torch.nn.functional.normalize(mean_of_others(z), dim=-1)
    other = torch.nn.functional.normalize(mean_of_others(torch.nn.functional.normalize(z, dim=-1)), dim=-1)
    assert (raw - other).abs().max() > 0.01


def test_mean_of_others_needs_two_views() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        mean_of_others(torch.zeros(1, 2, 3))


def test_negative_cosine() -> None:
    p, t = torch.randn(6, 9), torch.randn(6, 9)
    expected = -(p * t).sum(1) / (p.norm(dim=1) * t.norm(dim=1))
    torch.testing.assert_close(negative_cosine(p, t), expected)
    torch.testing.assert_close(negative_cosine(p, 3 * p), -torch.ones(6))


def test_negative_cosine_is_fp32_under_autocast() -> None:
    p, t = torch.randn(4, 2048), torch.randn(4, 2048)
    with torch.autocast("cpu", torch.bfloat16):
        out = negative_cosine(p.bfloat16(), t.bfloat16())
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, negative_cosine(p.bfloat16().float(), t.bfloat16().float()))


def test_feature_std_tells_health_from_collapse() -> None:
    d = 512
    healthy = feature_std(torch.randn(4, 256, d))
    assert abs(healthy.item() * math.sqrt(d) - 1) < 0.02
    assert feature_std(torch.randn(1, 1, d).expand(2, 64, d)) < 1e-6


def test_divide_is_column_major_and_tile_major() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4).repeat(2, 3, 1, 1)
    x[1] += 100
    tiles = divide(x, 2)
    assert tiles.shape == (8, 3, 2, 2)
    assert [t[0, 0, 0].item() for t in tiles] == [0, 100, 8, 108, 2, 102, 10, 110]  # TL, BL, TR, BR
    with pytest.raises(ValueError, match="multiples"):
        divide(x, 3)
