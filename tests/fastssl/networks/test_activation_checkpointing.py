"""Activation checkpointing: nothing but memory changes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from small import TinyResNet, batch_of, config_of, has
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from fastssl import methods
from fastssl.device import pick_precision
from fastssl.networks.activation_checkpointing import checkpoint_activations
from fastssl.networks.backbones import backbone
from fastssl.networks.batch_norm import batch_norm_groups, group_batch_norm
from fastssl.networks.encode import in_groups
from fastssl.progress import Progress
from fastssl.training.build import make_method, make_views
from fastssl.training.memory import Activations
from fastssl.training.step import Step
from loaders import Batch
from loaders.errors import UserError

# (backbone, stochastic depth): every kind of block, with BatchNorms of timm that activate, too.
FAMILIES = {
    "resnet18": 0.0,
    "resnet50": 0.0,
    "mobilenet_v2": 0.0,
    "vit-t32": 0.5,
    "timm/test_resnet": 0.5,
    "timm/test_convnext": 0.5,
    "timm/test_efficientnet": 0.5,
    "timm/test_vit": 0.5,
}
B, K, SIZE = 3, 2, 32


def pair(name: str, drop_path: float = 0.0, size: int = SIZE) -> tuple[nn.Module, nn.Module]:
    """A backbone in float64 with random residual branches, and a copy of its checkpointed form."""
    net, _ = backbone(name, size=size, zero_init_residual=False, drop_path=drop_path)
    net = group_batch_norm(net).double().train()
    checkpointed = copy.deepcopy(net)
    checkpoint_activations(checkpointed, name)
    return net, copy.deepcopy(checkpointed)


def two_steps(net: nn.Module, size: int = SIZE) -> dict[str, Tensor]:
    """Losses, gradients, weights and buffers of two steps of SGD, K views in one pass with groups of their own."""
    optimizer, seen = torch.optim.SGD(net.parameters(), 0.1), {}
    torch.manual_seed(1)  # views and stochastic depth
    for i in range(2):
        x = torch.randn(K * B, 3, size, size, dtype=torch.float64)
        loss = in_groups(net, x, K).square().mean()
        loss.backward()
        seen[f"loss {i}"] = loss.detach()
        seen |= {f"gradient {i} {name}": p.grad for name, p in net.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        seen |= {f"state {i} {name}": value.clone() for name, value in net.state_dict().items()}
    seen["random"] = torch.rand(1)  # as many random numbers were drawn
    return seen


def kept(call: Callable[[], Tensor], net: nn.Module) -> int:
    """Bytes that autograd keeps of a pass."""
    with (activations := Activations([*net.parameters(), *net.buffers()])):
        out = call()
    del out
    assert activations.now == 0
    return activations.peak


def calls_of(net: nn.Module) -> list[nn.Module]:
    """The blocks' convolutions and linear layers, one entry for each time that they are run from now on."""
    calls: list[nn.Module] = []
    for m in net.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            m.register_forward_hook(lambda m, *_: calls.append(m))
    return calls


@pytest.mark.parametrize("name", FAMILIES)
def test_two_steps_are_the_same_to_the_last_bit(name: str) -> None:
    size = 64 if name.startswith("vit") else SIZE
    net, checkpointed = pair(name, FAMILIES[name], size)
    assert list(net.state_dict()) == list(checkpointed.state_dict())
    x = torch.randn(B, 3, size, size, dtype=torch.float64)
    assert kept(lambda: checkpointed(x), checkpointed) < 0.8 * kept(lambda: net(x), net)
    net.load_state_dict(checkpointed.state_dict())  # the running statistics after different numbers of passes
    expected, found = two_steps(net, size), two_steps(checkpointed, size)
    assert list(found) == list(expected)
    for what, value in expected.items():
        assert torch.equal(found[what], value), what
    if FAMILIES[name] == 0:
        moved = [what for what in expected if what.startswith("state 1") and "running_mean" in what]
        assert moved and all(expected[what].abs().max() > 0 for what in moved)


@pytest.mark.parametrize("parts", [(3, 1), (1, 3)])
def test_groups_of_the_first_pass_hold_in_the_second(parts: tuple[int, int]) -> None:
    """`in_groups` sets them for the forward pass only; the second pass comes later, in the backward pass."""
    net, checkpointed = pair("resnet18")
    x = torch.randn(6, 3, SIZE, SIZE, dtype=torch.float64)
    for one in (net, checkpointed):
        in_groups(one, x, *parts).square().mean().backward()
    for p, q in zip(net.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_a_pass_with_frozen_statistics() -> None:
    """Micro-batches make their second pass so, and go backward outside."""
    net, checkpointed = pair("resnet18")
    x, before = torch.randn(B, 3, SIZE, SIZE, dtype=torch.float64), copy.deepcopy(net.state_dict())
    for one in (net, checkpointed):
        with batch_norm_groups(one, running="leave"):
            out = one(x)
        out.square().mean().backward()
        for name, value in one.state_dict().items():
            assert torch.equal(value, before[name]), name
    for p, q in zip(net.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_only_passes_with_gradients_in_train_mode_compute_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    _, net = pair("resnet18")
    x, calls = torch.randn(B, 3, SIZE, SIZE, dtype=torch.float64), calls_of(net)
    num = sum(isinstance(m, nn.Conv2d) for m in net.modules())
    in_blocks = num - 1
    with monkeypatch.context() as patch, torch.no_grad():
        patch.delattr("fastssl.networks.activation_checkpointing.checkpoint")
        net(x)
    assert len(calls) == num
    calls.clear()
    net(x).sum().backward()
    assert num + in_blocks - 8 <= len(calls) <= num + in_blocks  # a block's last convolution need not be made again
    calls.clear()
    before = copy.deepcopy(net.state_dict())
    net.eval()(x).sum().backward()
    assert len(calls) == num
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("name", [n for n in methods.available() if has(config_of(n), "dim")])
@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.usefixtures("tiny")
def test_every_method_trains_the_same(name: str, micro_batch: int | None) -> None:
    """The option reaches the backbone, and momentum copies and micro-batches work with it: two steps."""
    states = []
    for checkpointing in (False, True):
        config = config_of(name, backbone="resnet18-cifar")
        config.data.batch_size, config.run.precision, config.run.micro_batch = 4, "fp32", micro_batch
        config.model.activation_checkpointing = checkpointing
        cpu = torch.device("cpu")
        step = Step(config, make_method(config).double(), cpu, pick_precision("fp32", cpu))
        blocks = [m for m in step.method.backbone.modules() if isinstance(m, BasicBlock)]
        assert len(blocks) == 4 and all((type(m) is not BasicBlock) == checkpointing for m in blocks)
        batch = batch_of(make_views(config), B=4)
        torch.manual_seed(2)
        for i in range(2):
            views = [view.double() for view in batch.views]
            loss, _ = step(Batch(views, None, batch.index, batch.label), Progress(i, 2, 1))
        states.append({"loss": loss, **step.method.state_dict()})
    for what, value in states[0].items():
        assert torch.equal(states[1][what], value), what


@pytest.mark.parametrize(("name", "drop_path"), [("resnet", 0.0), ("timm/test_vit", 0.5)])
def test_compiled(name: str, drop_path: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler needs no second graph, recomputes, updates running statistics once, and drops the same paths."""
    if name == "resnet":
        monkeypatch.setitem(globals(), "backbone", lambda *_, **__: (TinyResNet(), TinyResNet.width))
    nets = pair(name, drop_path)
    x, seen = torch.randn(K * B, 3, SIZE, SIZE, dtype=torch.float64), []
    for net in nets:
        torch.compiler.reset()
        net.compile(backend="aot_eager", fullgraph=True)
        seen.append(two_steps(net))
    for what, value in seen[0].items():
        torch.testing.assert_close(seen[1][what], value, rtol=1e-9, atol=1e-12, msg=lambda m, what=what: f"{what}: {m}")
    plain, checkpointed = (kept(lambda net=net: in_groups(net, x, K), net) for net in nets)
    assert checkpointed < 0.95 * plain
    torch.compiler.reset()


def test_a_network_without_such_blocks_is_refused() -> None:
    config = config_of("simsiam", backbone="timm/dla46x_c")
    config.model.activation_checkpointing = True
    with pytest.raises(UserError, match="--activation-checkpointing: timm/dla46x_c is not made of blocks"):
        make_method(config)
