"""BatchNorm in groups: one pass over all views gives the values, gradients and statistics of as many separate ones."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from small import TinyResNet
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from fastssl.networks.backbones import backbone
from fastssl.networks.batch_norm import (
    GroupedBatchNorm,
    batch_norm_groups,
    group_batch_norm,
    need_batch_norm_groups,
    ungroup_batch_norm,
)
from fastssl.networks.encode import encode, encode_together, in_groups
from fastssl.networks.micro_batch import use_micro_batches
from loaders import UserError

B, C = 12, 3


def trained(net: nn.Module, x: Tensor, forward) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Outputs, gradients of the input and of all weights of some loss, and buffers."""
    net, x = copy.deepcopy(net), x.clone().requires_grad_()
    out = forward(net, x)
    weigh = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
    (out * weigh).sum().backward()
    return out, [x.grad, *(p.grad for p in net.parameters())], [*net.buffers()]


def norm_of(dims: int, affine: bool) -> nn.Module:
    norm = (nn.BatchNorm1d if dims == 1 else nn.BatchNorm2d)(C, affine=affine, momentum=0.3).double()
    for t in (*norm.parameters(), norm.running_mean):
        nn.init.normal_(t)
    return norm


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("dims", "V", "P", "images", "splits"),
    [
        (2, 1, 1, None, 1), (2, 4, 1, None, 1), (1, 3, 1, None, 1), (2, 2, 3, None, 1), (2, 1, 4, None, 1),
        (2, 3, 1, 4, 1), (1, 2, 4, 3, 1), (2, 2, 2, 4, 1), (2, 2, 1, None, 3), (1, 2, 1, 6, 2), (2, 2, 1, 24, 1),
    ],
)  # fmt: skip
def test_groups_are_separate_passes(
    dims: int, V: int, P: int, images: int | None, splits: int, affine: bool, compiled: bool
) -> None:
    """Every group of rows [V, P, B] through the plain BatchNorm by itself, batch after batch and view after view."""
    x = torch.randn(V * P * B, C, *[4, 2][: 2 * (dims - 1)], dtype=torch.float64)
    x = x * torch.linspace(1, 3, len(x)).view(-1, 1, *[1] * (x.ndim - 2)) + 2
    plain = norm_of(dims, affine)
    num = min(images or B, B)

    def separate(norm: nn.Module, x: Tensor) -> Tensor:
        rows, out = x.unflatten(0, (V, P, B)), torch.empty_like(x).unflatten(0, (V, P, B))
        for start, view in itertools.product(range(0, B, num), range(V)):
            before, after = (norm.running_mean, norm.running_var), []
            for split in range(splits):
                here = slice(start + split, start + num, splits)
                norm.running_mean, norm.running_var = (t.clone() for t in before)
                out[view, :, here] = norm(rows[view, :, here].flatten(0, 1)).unflatten(0, (P, -1))
                after.append((norm.running_mean, norm.running_var))
            norm.running_mean, norm.running_var = (sum(t) / splits for t in zip(*after, strict=True))
        return out.flatten(0, 2)

    def grouped(norm: nn.Module, x: Tensor) -> Tensor:
        group_batch_norm(norm, images=images, splits=splits)
        torch.compiler.reset()  # each case as in a process of its own: recompilations are limited
        call = torch.compile(norm, backend="aot_eager", fullgraph=True) if compiled else None
        return in_groups(norm, x, V, P, call)

    found, expected = trained(plain, x, grouped), trained(plain, x, separate)
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[2][:2], expected[2][:2], rtol=1e-10, atol=1e-10)
    assert found[2][2] == V * (B // num)  # num_batches_tracked


@pytest.mark.parametrize("name", ["resnet18-cifar", "mobilenet_v2"])
def test_a_network_sees_all_views_in_one_pass(name: str) -> None:
    """Values, gradients and running statistics of a whole backbone, two sizes, against view after view in float64."""
    torch.manual_seed(0)
    net = backbone(name, size=32, zero_init_residual=False)[0].double()
    views = [torch.randn(3, 3, s, s, dtype=torch.float64) for s in (64, 64, 32, 32, 32)]
    passes: list[int] = []

    def run(net: nn.Module, grouped: bool) -> tuple:
        net = group_batch_norm(copy.deepcopy(net)) if grouped else copy.deepcopy(net)
        net.register_forward_hook(lambda _m, x, _o: passes.append(len(x[0])))
        h = encode(net, views)
        h.square().sum().backward()
        return h, [p.grad for p in net.parameters()], [*net.buffers()]

    found, expected = run(net, True), run(net, False)
    assert passes == [6, 9, 3, 3, 3, 3, 3]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_joint_statistics_are_of_all_views() -> None:
    net = TinyResNet().double()
    views = [torch.randn(4, 3, 32, 32, dtype=torch.float64) * (i + 1) for i in range(3)]
    expected = encode_together(copy.deepcopy(net), views)
    own = encode(group_batch_norm(copy.deepcopy(net)), views)
    joint = encode(group_batch_norm(copy.deepcopy(net), joint=True), views)
    torch.testing.assert_close(joint, expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(own, expected)


def test_groups_leave_no_trace() -> None:
    """The next pass is of one group again, also after an error; evaluation knows no groups; the state dict is plain."""
    plain = norm_of(2, True)
    norm = group_batch_norm(copy.deepcopy(plain))
    x = torch.randn(4, C, 2, 2, dtype=torch.float64)
    in_groups(norm, x, 2)
    with pytest.raises(ZeroDivisionError):
        in_groups(norm, x, 2, call=lambda _x: 1 / 0)
    fresh = copy.deepcopy(plain)
    torch.testing.assert_close(norm(x), fresh(x))
    norm.eval(), norm.load_state_dict(fresh.state_dict())
    torch.testing.assert_close(in_groups(norm, x, 2), fresh.eval()(x))
    assert list(norm.state_dict()) == list(plain.state_dict()) and type(norm) is GroupedBatchNorm


def test_frozen_statistics_stay() -> None:
    norm = group_batch_norm(norm_of(2, True))
    before = copy.deepcopy(norm.state_dict())
    x = torch.randn(6, C, 2, 2, dtype=torch.float64)
    for views in (1, 2):
        with batch_norm_groups(norm, running="leave"):
            frozen = in_groups(norm, x, views)
        torch.testing.assert_close(dict(norm.state_dict()), dict(before), rtol=0, atol=0)
        torch.testing.assert_close(frozen, in_groups(copy.deepcopy(norm), x, views), rtol=0, atol=0)
    norm(x)
    assert not torch.equal(norm.running_mean, before["running_mean"])


def test_half_precision_keeps_its_type_and_fp32_statistics() -> None:
    norm = group_batch_norm(nn.BatchNorm2d(C))
    x = torch.randn(8, C, 4, 4).add(30).bfloat16().contiguous(memory_format=torch.channels_last)
    for compiled in (False, True):
        call = torch.compile(norm, backend="aot_eager") if compiled else None
        out = in_groups(norm, x, 2, call=call)
        assert out.dtype == torch.bfloat16 and out.is_contiguous(memory_format=torch.channels_last)
        exact = torch.cat([nn.BatchNorm2d(C).double()(part.double()) for part in x.chunk(2)])
        torch.testing.assert_close(out.double(), exact, rtol=0.01, atol=0.01)


def test_a_batch_norm_that_does_more_goes_view_by_view() -> None:
    class AndMore(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return super().forward(x).relu()

    seen: list[int] = []
    in_groups(group_batch_norm(nn.Sequential(AndMore(C))), torch.randn(6, C, 2, 2), 3)
    assert seen == [2, 2, 2]
    with pytest.raises(UserError, match=r"--micro-batch.*AndMore"):
        use_micro_batches(nn.Sequential(AndMore(C)), [], 2)


def test_timms_batch_norm_with_activation_is_grouped() -> None:
    """Each view as by itself, with the activation; ungrouped it is what it was."""
    torch.manual_seed(0)
    plain = BatchNormAct2d(C).double()
    x = torch.randn(6, C, 4, 4, dtype=torch.float64)
    alone = copy.deepcopy(plain)
    expected = torch.cat([alone(view) for view in x.chunk(3)])
    grouped = group_batch_norm(copy.deepcopy(plain))
    torch.testing.assert_close(in_groups(grouped, x, 3), expected)
    torch.testing.assert_close(dict(grouped.state_dict()), dict(alone.state_dict()))
    torch.testing.assert_close(grouped.eval()(x), alone.eval()(x))
    assert isinstance(grouped, BatchNormAct2d) and type(ungroup_batch_norm(grouped)) is BatchNormAct2d


@pytest.mark.parametrize("name", ["timm/test_efficientnet", "timm/mobilenetv3_small_050", "timm/regnetx_002"])
def test_networks_with_it_have_groups(name: str) -> None:
    net = backbone(name, size=32)[0].double()
    need_batch_norm_groups(net, "--sync-bn")
    views = [torch.randn(2, 3, 32, 32, dtype=torch.float64) for _ in range(2)]
    own = torch.stack([copy.deepcopy(net)(view) for view in views])
    torch.testing.assert_close(encode(group_batch_norm(net), views), own, rtol=1e-9, atol=1e-9)
