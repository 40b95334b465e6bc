"""Micro-batches: the loss and the gradients of the whole batch with BatchNorm over the parts, for every method."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from small import cases, made
from torch import nn

from fastssl import methods
from fastssl.config.schema import RunConfig
from fastssl.device import pick_precision
from fastssl.networks.batch_norm import group_batch_norm
from fastssl.networks.encode import in_groups
from fastssl.networks.micro_batch import MicroBatches, slices
from fastssl.progress import Progress
from fastssl.train import main
from fastssl.training.step import Step
from loaders import Batch

IMAGES, PART, STEPS = 8, 4, 3
CPU = torch.device("cpu")
FP32 = pick_precision("fp32", CPU)
ACTIVE = {"ema": 0.9, "freeze_epochs": 1, "queue_from_epoch": 0, "queue_size": 2 * IMAGES}
ADDONS: tuple[dict[str, object], ...] = (
    {},
    {"patches": "divide-encode-combine"},
    {"patches": "montage"},
    {"guided": "guided", "guided_views": 2},
    {"num_local": 2, "local_size": 16, "alpha": 0.4},
)
CASES = cases(ADDONS, ACTIVE)
del CASES["fastsiam patches=montage"]  # is for methods of two views


def steps(name: str, options: dict[str, object], micro: bool) -> tuple[list, nn.Module, RunConfig]:
    """Losses, gradients and weights of some steps in float64: in micro-batches, or in one pass in groups as large."""
    config, method, batch = made(name, B=IMAGES, **options)
    config.run.precision, config.run.compile, config.data.batch_size = "fp32", "off", IMAGES
    config.optim.lr, config.run.micro_batch = 0.1, PART if micro else None
    for p in method.parameters():
        if p.ndim == 1 and p.requires_grad:  # not SimSiam's zero at the end of every residual branch
            nn.init.uniform_(p, 0.5, 1)
    step = Step(config, group_batch_norm(method, images=PART).double(), CPU, FP32)
    seen = []
    hooked, grads = method.after_backward, []

    def hook(progress: Progress) -> None:
        grads.append({n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None})
        hooked(progress)

    method.after_backward = hook
    for i in range(STEPS):
        torch.manual_seed(i)  # guided stop-gradient draws partners
        views = [(v.roll(i, 0) + i * v.roll(1, 3)).double() for v in batch.views]
        loss, metrics = step(Batch(views, None, batch.index, batch.label), Progress(i, STEPS, 1))
        seen.append((loss, metrics, grads[-1]))
    return seen, method, config


@pytest.mark.parametrize("case", CASES)
def test_micro_batches_are_the_whole_batch(case: str) -> None:
    """Losses, gradients, queues, centres, momentum networks and running statistics of three steps, to rounding."""
    name, options = CASES[case]
    found, method, _ = steps(name, options, micro=True)
    expected, whole, _ = steps(name, options, micro=False)
    separable = getattr(method, "separable", False)
    for (loss, metrics, grads), (loss_, metrics_, grads_) in zip(found, expected, strict=True):
        torch.testing.assert_close(loss, loss_, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(grads, grads_, rtol=1e-5, atol=1e-8)
        if not separable:  # the std over a part is another one
            torch.testing.assert_close(metrics, metrics_, rtol=1e-5, atol=1e-6)
    state, state_ = method.state_dict(), whole.state_dict()
    for key in state:
        # Where targets of whole views follow predictions from parts, the order of the two kinds is another one.
        if not (separable and "running" in key):
            torch.testing.assert_close(state[key], state_[key], rtol=1e-5, atol=1e-8, msg=lambda m, k=key: f"{k}: {m}")


def test_which_methods_need_no_second_pass() -> None:
    separable = {n for n in methods.available() if getattr(made(n)[1], "separable", False)}
    assert separable == {"simsiam", "fastsiam", "byol", "dino"}
    assert not made("simsiam", guided="guided")[1].separable and not made("byol", patches="montage")[1].separable


@pytest.mark.parametrize("name", ["simsiam", "mocov3"])
def test_the_network_sees_parts_only(name: str) -> None:
    config, method, batch = made(name, B=IMAGES)
    config.run.precision, config.data.batch_size, config.run.micro_batch = "fp32", IMAGES, PART
    step = Step(config, group_batch_norm(method), CPU, FP32)
    sizes, graphs = [], []

    def look(_module: nn.Module, inputs: tuple, _output: object) -> None:
        sizes.append(len(inputs[0]))
        graphs.append(torch.is_grad_enabled())

    method.backbone.conv1.register_forward_hook(look)
    step(batch, Progress(0, 1, 1))
    assert set(sizes) == {2 * PART}
    n = IMAGES // PART
    assert graphs == ([True] * n if name == "simsiam" else [False] * n + [True] * n)


def test_random_numbers_are_the_same_in_both_passes() -> None:
    """Dropout in the second pass drops what it dropped in the first, and later random numbers are not disturbed."""
    torch.manual_seed(3)
    net, masks = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), []
    net[1].register_forward_hook(lambda _m, _x, out: masks.append(out.detach() != 0))
    net.micro_batches = MicroBatches(2)
    x = torch.randn(6, 4)
    h = in_groups(net, x, 1)
    h.sum().backward()
    state = torch.get_rng_state()
    net.micro_batches.backward(torch.enable_grad)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(masks) == 6 and all(torch.equal(a, b) for a, b in zip(masks[:3], masks[3:], strict=True))
    assert not torch.equal(masks[0], masks[1])
    kept = torch.cat(masks[:3]).double()
    torch.testing.assert_close(net[0].weight.grad.double(), 2 * kept.T @ x.double(), rtol=1e-5, atol=1e-5)


def test_no_graph_no_second_pass() -> None:
    net = copy.deepcopy(nn.Linear(4, 4))
    net.micro_batches = MicroBatches(2)
    with torch.no_grad():
        h = in_groups(net, torch.randn(6, 4), 1)
    assert not h.requires_grad and not net.micro_batches._passes


def test_slices_keep_views_and_tiles_of_their_images() -> None:
    view, num = torch.arange(6.0).view(6, 1, 1, 1), 6
    tiles = torch.cat([view + 100 * tile for tile in range(4)])  # tile-major
    parts = list(slices(Batch([view, view + 0.5], [tiles], torch.arange(num), torch.arange(num)), 2))
    assert [part.index.tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
    assert parts[1].views[1].flatten().tolist() == [2.5, 3.5]
    assert parts[2].tiles[0].flatten().tolist() == [4, 5, 104, 105, 204, 205, 304, 305]


def test_a_run_in_micro_batches(beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = ["--data", str(beton), "--backbone", "resnet18", "--size", "32", "--batch-size", "8", "--max-steps", "2"]
    flags += ["--method", "swav", "--prototypes", "16", "--projector-hidden", "32", "--device", "cpu"]
    assert main([*flags, "--micro-batch", "4", "--out", str(tmp_path / "run")]) == 0
    for bad, why in (("3", "does not divide the 8 images"), ("1", "2 images or more")):
        assert main([*flags, "--micro-batch", bad, "--out", str(tmp_path / "bad")]) == 2
        assert why in capsys.readouterr().err and not (tmp_path / "bad").exists()
