"""Momentum targets: the copy, its updates and their schedule."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import made
from torch import nn

from fastssl.methods.base import Method
from fastssl.networks.backbones import backbone
from fastssl.networks.momentum import Momentum, ema_update, momentum_copy
from fastssl.progress import Progress

WITH_MOMENTUM = ("byol", "mocov3", "fastmoco", "mocov2", "dino")
MODULES = ("backbone", "projector", "prototypes")


def network() -> nn.Module:
    """With weights that no formula leaves alone."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 5))
    with torch.no_grad():
        for p in net.parameters():
            p.normal_()
    return net


def parameters(*modules: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for m in modules for p in m.parameters()]


def targets_of(method: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    return [(getattr(method, "target_" + n), getattr(method, n)) for n in MODULES if hasattr(method, "target_" + n)]


# ------------------------------------------------------------------ updates


@settings(deadline=None, max_examples=30)
@given(m=st.floats(0, 1), steps=st.integers(1, 4))
def test_update_is_its_formula(m: float, steps: int) -> None:
    network_a, network_b, target_a, target_b = (network() for _ in range(4))
    expected = parameters(target_a, target_b)
    for _ in range(steps):
        expected = [m * t + (1 - m) * p for t, p in zip(expected, parameters(network_a, network_b), strict=True)]
        ema_update([(target_a, network_a), (target_b, network_b)], m)
    for found, value in zip(parameters(target_a, target_b), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("m", [0.0, 1.0])
def test_zero_copies_and_one_freezes_exactly(m: float) -> None:
    net, target = network(), network()
    with torch.no_grad():
        for p in target.parameters():
            p.mul_(1e4)  # t + (p - t) would lose digits
    before = parameters(net, target)
    ema_update([(target, net)], m)
    for found, expected in zip(parameters(target), parameters(net) if m == 0 else before[6:], strict=True):
        assert torch.equal(found, expected)
    for found, expected in zip(parameters(net), before[:6], strict=True):
        assert torch.equal(found, expected)


def test_buffers_stay_each_ones_own() -> None:
    net, target = network(), momentum_copy(network())
    net(torch.randn(8, 3, 3, 3) * 5 + 3)
    before = {n: b.clone() for n, b in target.named_buffers()}
    ema_update([(target, net)], 0.0)
    for name, b in target.named_buffers():
        assert torch.equal(b, before[name])
    assert net[1].num_batches_tracked == 1 and target[1].num_batches_tracked == 0
    target(torch.randn(8, 3, 3, 3))
    assert target[1].num_batches_tracked == 1  # in train mode it has statistics of its own
    assert (target[1].running_mean != net[1].running_mean).all()


# ------------------------------------------------------------------ copies


def test_a_copy_is_equal_apart_and_without_gradient() -> None:
    net = network()
    target = momentum_copy(net)
    assert all(map(torch.equal, parameters(net), parameters(target)))
    assert not any(p.requires_grad for p in target.parameters()) and all(p.requires_grad for p in net.parameters())
    before = parameters(target)
    with torch.no_grad():
        net[0].weight.add_(1)
    assert all(map(torch.equal, before, parameters(target)))
    assert target.training


def test_an_independent_start_is_another_draw_of_the_same_numbers() -> None:
    net = network()
    before = parameters(net)
    target = momentum_copy(net, "independent")
    for p, t in zip(before, parameters(target), strict=True):
        assert p.shape == t.shape and not torch.equal(p, t)
        assert torch.equal(p.flatten().sort().values, t.flatten().sort().values)
    assert all(map(torch.equal, before, parameters(net)))
    conv, other = net[0].weight.flatten(), target[0].weight.flatten()
    assert abs(torch.corrcoef(torch.stack([conv, other]).detach())[0, 1]) < 0.5  # 108 numbers: 5 standard deviations


def test_residual_branches_that_start_at_zero_do_so_in_an_independent_target() -> None:
    net, _ = backbone("resnet18", size=32, zero_init_residual=True)
    target = momentum_copy(net, "independent")
    for layer in (target.layer1, target.layer4):
        assert all((block.bn2.weight == 0).all() and (block.bn1.weight == 1).all() for block in layer)


def test_no_block_is_dropped_in_a_target() -> None:
    net, width = backbone("vit-t32", size=32, drop_path=0.5)
    target = momentum_copy(net)
    x = torch.randn(2, 3, 32, 32)
    assert max(m.drop_prob for m in net.modules() if hasattr(m, "drop_prob")) == 0.5
    assert all(m.drop_prob == 0 for m in target.modules() if hasattr(m, "drop_prob"))
    with torch.no_grad():
        torch.testing.assert_close(target.train()(x), net.eval()(x))
        assert not torch.equal(net.train()(x), net(x))
    assert target(x).shape == (2, width)


# ------------------------------------------------------------------ schedule


def test_cosine_rises_from_m_to_one() -> None:
    options = Momentum(ema=0.996, ema_schedule="cosine")
    at = [options.ema_at(Progress(step, 1000, 10)) for step in range(1001)]
    assert at[0] == pytest.approx(0.996)
    assert at[500] == pytest.approx(0.998)
    assert at[250] == pytest.approx(1 - 0.004 * (math.sqrt(0.5) + 1) / 2)
    assert at[1000] == 1
    assert at == sorted(at)
    assert {Momentum(ema=0.99).ema_at(Progress(step, 100, 10)) for step in range(100)} == {0.99}


# ------------------------------------------------------------------ in the methods (T10)


def apart(name: str, **options: object) -> nn.Module:
    """A method whose network has left its target behind."""
    method = made(name, **options)[1]
    with torch.no_grad():
        for _, net in targets_of(method):
            for p in net.parameters():
                p.add_(torch.randn_like(p))
    return method


def hook_of(method: nn.Module, progress: Progress) -> None:
    for hook in ("before_step", "after_step"):
        if hasattr(method, hook):
            getattr(method, hook)(progress)


@pytest.mark.parametrize("name", WITH_MOMENTUM)
def test_targets_follow_before_or_after_the_step_as_published(name: str) -> None:
    """DINO's teacher follows the optimiser's step; the others' keys are made by targets that have followed already."""
    method = apart(name, ema=0.5)
    assert (type(method).after_step is not Method.after_step) == (name == "dino")
    target = method.target_backbone
    before = parameters(target)
    method.before_step(Progress(0, 10, 5))
    assert all(map(torch.equal, before, parameters(target))) == (name == "dino")
    method.after_step(Progress(0, 10, 5))
    assert not any(map(torch.equal, before, parameters(target)))


@pytest.mark.parametrize("name", WITH_MOMENTUM)
def test_targets_stand_still_at_the_end_of_a_cosine(name: str) -> None:
    """m is nearly 1 in the last step, and `ema` in the first."""
    for step, follows in ((0, 0.5), (999_999, 0.0)):
        method = apart(name, ema=0.5, ema_schedule="cosine")
        old, new = parameters(method.target_backbone), parameters(method.backbone)
        hook_of(method, Progress(step, 1_000_000, 100))
        for found, a, b in zip(parameters(method.target_backbone), old, new, strict=True):
            torch.testing.assert_close(found, torch.lerp(a, b, follows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", WITH_MOMENTUM)
def test_targets_are_in_train_mode_and_nothing_but_the_hooks_moves_them(name: str) -> None:
    _, method, batch = made(name)
    before = parameters(*[t for t, _ in targets_of(method)])
    norm = method.target_backbone.bn1
    batches = int(norm.num_batches_tracked)
    method(batch)[0].backward()
    assert norm.num_batches_tracked > batches
    assert all(map(torch.equal, before, parameters(*[t for t, _ in targets_of(method)])))


@pytest.mark.parametrize("name", WITH_MOMENTUM)
@pytest.mark.parametrize("init", ["copy", "independent"])
def test_where_targets_begin(name: str, init: str) -> None:
    method = made(name, target_init=init)[1]
    for target, net in targets_of(method):
        weights = [(a, b) for a, b in zip(parameters(target), parameters(net), strict=True) if a.ndim > 1]
        assert all(torch.equal(a, b) == (init == "copy") for a, b in weights)
