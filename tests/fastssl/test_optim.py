"""Schedules and parameter groups."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fastssl import presets
from fastssl.config import Optim
from fastssl.core import make_method
from fastssl.optim import lr_at, make_sgd, scaled_lr, set_lr


def test_linear_scaling() -> None:
    assert scaled_lr(Optim(lr=0.125, lr_batch_size=32), 32) == 0.125
    assert scaled_lr(Optim(lr=0.125, lr_batch_size=32), 256) == 1.0  # 20 times SimSiam's
    assert scaled_lr(Optim(lr=0.05, lr_batch_size=256), 512) == pytest.approx(0.1)


def test_cosine_per_epoch_is_simsiams() -> None:  # T11
    optim = Optim(epochs=100, schedule="epoch")
    for epoch in (0, 1, 50, 99):
        expected = 0.5 * 0.1 * (1 + math.cos(math.pi * epoch / 100))
        for step in (0, 6):
            assert lr_at(optim, 0.1, epoch * 7 + step, 7) == pytest.approx(expected)


def test_cosine_per_step_and_warmup() -> None:
    optim = Optim(epochs=10, schedule="step", warmup_epochs=2)
    rates = [lr_at(optim, 1.0, step, 5) for step in range(50)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 39 / 40)))


@pytest.mark.parametrize("fixed", [True, False])
def test_predictor_rate_is_fixed_on_request(fixed: bool) -> None:  # T11
    config = presets.load("simsiam-cifar10-800ep")
    config.method_options.fix_pred_lr = fixed
    method = make_method(config)
    optimizer = make_sgd(method, config.optim, 0.1)
    set_lr(optimizer, 0.03)
    predictor = {id(p) for p in method.predictor.parameters()}
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert {rates[i] for i in predictor} == ({0.1} if fixed else {0.03})
    assert {r for i, r in rates.items() if i not in predictor} == {0.03}
    assert {g["weight_decay"] for g in optimizer.param_groups} == {5e-4}


def test_groups_must_cover_every_parameter() -> None:
    method = make_method(presets.load("demo"))
    method.param_groups = lambda: [{"params": list(method.backbone.parameters()), "fixed_lr": False}]
    with pytest.raises(ValueError, match="exactly once"):
        make_sgd(method, Optim(), 0.1)


def test_one_step_is_torchs_sgd() -> None:
    """The fused step with its groups does what the plain formula says."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    optimizer = make_sgd(layer, Optim(momentum=0.9, weight_decay=0.01), 0.5)
    layer(torch.ones(4, 3)).sum().backward()
    gradient = layer.weight.grad.clone()
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), before - 0.5 * (gradient + 0.01 * before))
