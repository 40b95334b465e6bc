"""Heads of every method as published, BatchNorm groups, and the queue."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastssl import methods
from fastssl.methods import mocov2
from fastssl.networks.batch_norm import GroupedBatchNorm, group_batch_norm, groups_of
from fastssl.networks.encode import each_view, encode, encode_shuffled, encode_together
from fastssl.networks.heads import Heads, WeightNormLinear, make_heads, mlp
from fastssl.networks.queue import Queue
from loaders import Batch, UserError

# ------------------------------------------------------------------ heads as published


def described(head: nn.Module) -> list[str]:
    """The layers in short: 8-4+b is a Linear with bias, BN and bn are BatchNorms with and without scale and shift."""
    found = []
    for m in head:
        if isinstance(m, nn.Linear):
            found.append(f"{m.in_features}-{m.out_features}" + ("" if m.bias is None else "+b"))
        elif isinstance(m, nn.BatchNorm1d):
            found.append(f"{'BN' if m.affine else 'bn'}{m.num_features}")
        else:
            found.append(type(m).__name__)
    return found


def layers(text: str) -> list[str]:
    return text.replace("R", "ReLU").replace("G", "GELU").split()


SIMSIAM_G = "{d}-{d} BN{d} R {d}-{d} BN{d} R {d}-2048 bn2048"
SIMSIAM_H = "2048-512 BN512 R 512-2048+b"
FASTMOCO_G = "{d}-2048+b BN2048 R 2048-2048+b BN2048 R 2048-2048+b BN2048"

# Method, options, g and h for features of {d} channels.
PUBLISHED = [
    ("simsiam", {}, SIMSIAM_G, SIMSIAM_H),
    ("simsiam", {"projector_layers": 2, "projector_hidden": 2048}, "{d}-2048 BN2048 R 2048-2048 bn2048", SIMSIAM_H),
    ("fastsiam", {}, SIMSIAM_G, SIMSIAM_H),
    ("byol", {}, "{d}-4096+b BN4096 R 4096-256", "256-4096+b BN4096 R 4096-256"),
    (  # in the official code of guided stop-gradient
        "byol",
        {"dim": 2048, "projector_layers": 3, "projector_hidden": None, "projector_bias": "none"}
        | {"projector_norm": "fixed", "predictor_hidden": 512, "predictor_bias": "last"},
        SIMSIAM_G,
        SIMSIAM_H,
    ),
    ("mocov3", {}, "{d}-4096 BN4096 R 4096-256 bn256", "256-4096 BN4096 R 4096-256"),
    (
        "mocov3",
        {"projector_layers": 3, "predictor_norm": "fixed"},  # with ViTs
        "{d}-4096 BN4096 R 4096-4096 BN4096 R 4096-256 bn256",
        "256-4096 BN4096 R 4096-256 bn256",
    ),
    ("fastmoco", {}, FASTMOCO_G, "2048-512+b BN512 R 512-2048+b"),
    ("nnclr", {}, "{d}-2048 BN2048 R 2048-2048 BN2048 R 2048-256 BN256", "256-4096 BN4096 R 4096-256+b"),
    ("nnclr", {"projector_layers": 2}, "{d}-2048 BN2048 R 2048-256 BN256", "256-4096 BN4096 R 4096-256+b"),
    ("mocov2", {}, "{d}-{d}+b R {d}-128+b", None),
    ("mocov2", {"projector_hidden": 2048}, "{d}-2048+b R 2048-128+b", None),
    ("swav", {}, "{d}-2048+b BN2048 R 2048-128+b", None),
    ("swav", {"projector_hidden": 4096}, "{d}-4096+b BN4096 R 4096-128+b", None),
    ("dino", {}, "{d}-2048+b BN2048 G 2048-2048+b BN2048 G 2048-256+b", None),
    ("dino", {"projector_bn": False}, "{d}-2048+b G 2048-2048+b G 2048-256+b", None),
]


def method(name: str, width: int, **options: object) -> nn.Module:
    return methods.load(name).Method(nn.Linear(4, width), width, methods.load(name).Config(**options))


@pytest.mark.parametrize("width", [512, 2048])
@pytest.mark.parametrize(("name", "options", "projector", "predictor"), PUBLISHED)
def test_heads_are_the_published_ones(name: str, options: dict, projector: str, predictor: str, width: int) -> None:
    with torch.device("meta"):  # shapes without numbers
        made = method(name, width, **options)
    assert described(made.projector) == layers(projector.format(d=width))
    if predictor is None:
        assert not hasattr(made, "predictor")
    else:
        assert described(made.predictor) == layers(predictor)
    if hasattr(made, "target_projector"):
        assert described(made.target_projector) == described(made.projector)
        assert not hasattr(made, "target_predictor")


def test_prototypes_and_queues_are_the_published_ones() -> None:
    with torch.device("meta"):
        swav, dino, mocov2, nnclr = (method(name, 512) for name in ("swav", "dino", "mocov2", "nnclr"))
        ours = method("swav", 512, queue_size=3840)
    assert described([swav.prototypes]) == ["128-3000"] and not swav.queues
    assert [queue.rows.shape for queue in ours.queues] == [(3840, 128)] * 2  # one for each large view
    assert dino.prototypes.weight.shape == (65536, 256) and dino.center.shape == (65536,)
    assert mocov2.queue.rows.shape == (65536, 128)
    assert nnclr.queue.rows.shape == (98304, 256)


@pytest.mark.parametrize("bias", ["none", "hidden", "last", "all"])
def test_options_of_heads(bias: str) -> None:
    g, h = make_heads(8, Heads(dim=4, projector_layers=1, predictor_hidden=2, predictor_bias=bias))
    assert described(g) == ["8-4", "bn4"]
    assert isinstance(make_heads(8, Heads(dim=4, predictor=False))[1], nn.Identity)
    first, last = {"none": ("", ""), "hidden": ("+b", ""), "last": ("", "+b"), "all": ("+b", "+b")}[bias]
    assert described(h) == ["4-2" + first, "BN2", "ReLU", "2-4" + last]
    head = mlp([8, 4, 2], bias="hidden", output_norm="affine")
    assert described(head) == ["8-4+b", "BN4", "ReLU", "4-2", "BN2"]


@pytest.mark.parametrize("name", ["dim", "projector_layers", "projector_hidden", "predictor_hidden"])
def test_widths_of_nothing_name_their_flag(name: str) -> None:
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} 0"):
        Heads(**{name: 0}).validate()
    Heads(**{name: 1}).validate()


# ------------------------------------------------------------------ initialisation


def norms(module: nn.Module) -> list[nn.BatchNorm1d]:
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm1d) and m.affine]


def test_scales_of_batch_norm_start_at_one_or_as_fast_mocos() -> None:
    """Uniform in (0, 1), in projector and predictor, and nowhere else."""
    net = nn.Sequential(nn.Linear(4, 64), nn.BatchNorm1d(64))
    small = {"dim": 512, "projector_hidden": 512}
    for options, uniform in (({}, False), ({"norm_init": "uniform"}, True)):
        made = methods.load("fastmoco").Method(net, 64, methods.load("fastmoco").Config(**small, **options))
        assert len(norms(made.projector)) == 3 and len(norms(made.predictor)) == 1
        for norm in (*norms(made.projector), *norms(made.predictor)):
            assert (norm.bias == 0).all()
            if uniform:
                assert 0 <= norm.weight.min() < 0.05 and 0.95 < norm.weight.max() < 1
                assert abs(norm.weight.mean() - 0.5) < 0.06  # 4.7 standard deviations of 512 draws
            else:
                assert (norm.weight == 1).all()
        assert (net[1].weight == 1).all()


@pytest.mark.parametrize(
    ("name", "options", "std"),
    [
        ("dino", {}, 0.02),
        ("mocov2", {}, None),
        ("mocov2", {"projector_init": "vit"}, 0.02),
        ("swav", {}, None),
        ("swav", {"projector_init": "normal"}, 0.01),
    ],
)
def test_how_heads_start(name: str, options: dict, std: float | None) -> None:
    small = {"dim": 16, "projector_hidden": 256}
    small |= {"prototypes": 32} if name != "mocov2" else {"queue_size": 8}
    made = method(name, 64, **small, **options)
    first = next(m for m in made.projector if isinstance(m, nn.Linear))
    torchs = 1 / math.sqrt(3 * 64)  # uniform up to 1 / sqrt(64)
    assert abs(first.weight.std() / (std or torchs) - 1) < 0.05
    assert bool((first.bias == 0).all()) == (std is not None)


@pytest.mark.parametrize("trainable", [True, False])
def test_dinos_last_layer_has_unit_rows(trainable: bool) -> None:
    layer = WeightNormLinear(16, 32, trainable=trainable)
    x = torch.randn(3, 5, 16)
    rows = layer.weight / layer.weight.norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer(x), x @ rows.T)
    with torch.no_grad():
        layer.weight.mul_(torch.rand(32, 1) + 0.5)  # their lengths do not count
    torch.testing.assert_close(layer(x), x @ rows.T)
    shapes = {n: tuple(p.shape) for n, p in layer.named_parameters()}
    assert shapes == {"weight": (32, 16)} | ({"length": (32,)} if trainable else {})
    decaying = WeightNormLinear(16, 32, trainable=trainable, decays=True)  # among the matrices, as in DINO's code
    decaying.load_state_dict({n: t.view(decaying.state_dict()[n].shape) for n, t in layer.state_dict().items()})
    torch.testing.assert_close(decaying(x), layer(x))
    assert all(p.ndim == 2 for p in decaying.parameters())
    if trainable:
        with torch.no_grad():
            layer.length.copy_(torch.arange(32.0))
        torch.testing.assert_close(layer(x), x @ rows.T * torch.arange(32.0))


def test_dinos_last_layer_is_torchs_weight_norm() -> None:
    """Values and gradients of the length and of the direction."""
    ours, theirs = WeightNormLinear(6, 4, trainable=True), nn.Linear(6, 4, bias=False)
    theirs = nn.utils.parametrizations.weight_norm(theirs)
    g, v = theirs.parametrizations.weight.original0, theirs.parametrizations.weight.original1
    with torch.no_grad():
        v.copy_(ours.weight)
        g.copy_(torch.rand(4, 1) + 0.5)
        ours.length.copy_(g[:, 0])
    x, weigh = torch.randn(5, 6), torch.randn(5, 4)
    for layer in (ours, theirs):
        (layer(x) * weigh).sum().backward()
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.weight.grad, v.grad)
    torch.testing.assert_close(ours.length.grad, g.grad[:, 0])


def test_groups_of_parameters() -> None:
    for fixed in (True, False):
        made = method("byol", 8, dim=4, projector_hidden=8, predictor_hidden=4, fix_pred_lr=fixed)
        made.backbone.bias.requires_grad_(False)
        rest, predictor = made.param_groups()
        assert (rest["fixed_lr"], predictor["fixed_lr"]) == (False, fixed)
        assert {id(p) for p in predictor["params"]} == {id(p) for p in made.predictor.parameters()}
        assert {id(p) for p in rest["params"]} == {id(made.backbone.weight), *map(id, made.projector.parameters())}
    alone = method("simsiam", 8, dim=4, predictor=False)
    assert alone.param_groups()[1]["params"] == []


# ------------------------------------------------------------------ BatchNorm groups


class Sizes(nn.Module):
    """Remembers the batches that it sees and normalises them."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.norm(x).square().mean((2, 3))


@pytest.mark.parametrize("grouped", [True, False])
def test_each_view_has_its_own_statistics(grouped: bool) -> None:
    """Views of one size in one pass, or one by one where BatchNorm knows no groups, as outside a run."""
    net, head = Sizes(), nn.BatchNorm1d(3)
    if grouped:
        group_batch_norm(net), group_batch_norm(head)
    views = [torch.randn(4, 3, s, s) * s for s in (8, 8, 4)]
    found = each_view(head, encode(net, views))
    assert [len(x) for x in net.seen] == ([8, 4] if grouped else [4, 4, 4])
    expected = [nn.BatchNorm1d(3)(Sizes()(x)) for x in views]
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [((8,), [1]), ((8, 8), [2]), ((8, 8, 4, 4, 4), [2, 3]), ((8, 4, 8), [1, 1, 1]), ((4, 4, 4), [3])],
)
def test_views_of_one_size_are_encoded_together(sizes: tuple, groups: list) -> None:
    net, views = Sizes(), [torch.randn(4, 3, s, s) + i for i, s in enumerate(sizes)]
    found = encode_together(net, views)
    assert found.shape == (len(sizes), 4, 3)
    assert [len(x) for x in net.seen] == [4 * n for n in groups]
    rest = iter(views)
    expected = [Sizes()(torch.cat([next(rest) for _ in range(n)])) for n in groups]
    torch.testing.assert_close(found.flatten(0, 1), torch.cat(expected))


def test_split_batch_norm_goes_everywhere_and_needs_equal_parts() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    net[1][1].weight.requires_grad_(False)
    names = list(net.state_dict())
    split = group_batch_norm(net, splits=4)
    assert [m.groups.splits for m in split.modules() if isinstance(m, GroupedBatchNorm)] == [4, 4]
    assert list(split.state_dict()) == names
    assert not split[1][1].weight.requires_grad and split[1][1].bias.requires_grad
    with pytest.raises(UserError, match=r"6 images does not split into --bn-splits 4 parts"):
        mocov2.Config(bn_splits=4).check_batch(6)
    assert split.eval()(torch.randn(6, 3, 2, 2)).shape == (6, 4, 2, 2)


def test_shuffled_rows_come_back_to_their_places() -> None:
    seen: list[Tensor] = []

    class Look(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return x.flatten(1).sum(1, keepdim=True)

    x = torch.randn(16, 3, 2, 2, requires_grad=True)
    found = encode_shuffled(Look(), x)
    torch.testing.assert_close(found, x.detach().flatten(1).sum(1, keepdim=True))
    assert not found.requires_grad
    encode_shuffled(Look(), x)
    orders = [torch.cdist(s.flatten(1), x.detach().flatten(1)).argmin(1).tolist() for s in seen]
    assert all(sorted(order) == list(range(16)) for order in orders)
    assert list(range(16)) not in orders and orders[0] != orders[1]


def test_moco_shuffles_keys_that_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    module = methods.load("mocov2")
    calls = []
    monkeypatch.setattr(module, "encode_shuffled", lambda net, x: calls.append(1) or encode_shuffled(net, x))
    for options, shuffles in (
        ({"bn_splits": 2}, True),
        ({"bn_splits": 2, "shuffle_bn": False}, False),
        ({"bn_splits": 1}, False),  # one process, one batch: nothing to shuffle
    ):
        net = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        made = module.Method(net, 3, module.Config(dim=4, queue_size=8, **options))
        calls.clear()
        made(Batch([torch.randn(6, 3, 4, 4) for _ in range(2)], None, torch.arange(6), torch.zeros(6)))
        assert bool(calls) == shuffles
        for part in (made.backbone, made.target_backbone):
            assert groups_of(part).splits == options["bn_splits"]


# ------------------------------------------------------------------ the queue (T10)


@settings(deadline=None, max_examples=50)
@given(size=st.integers(1, 7), pushes=st.lists(st.integers(0, 10), max_size=6))
def test_queue_keeps_the_last_rows_first_in_first_out(size: int, pushes: list[int]) -> None:
    """More rows than fit, too; from the next place on, the rows are those of a plain list, oldest first."""
    queue = Queue(size, 2)
    kept, storage = queue.rows.clone(), queue.rows.data_ptr()
    for i, num in enumerate(pushes):
        rows = torch.full((num, 2), float(i)) + torch.arange(num)[:, None] / 100
        queue.push(rows)
        kept = torch.cat([kept, rows])[-size:]
        assert torch.equal(queue.rows.roll(-int(queue.next), 0), kept)
        assert queue.rows.data_ptr() == storage


def test_queue_starts_with_unit_vectors_and_detaches() -> None:
    queue = Queue(2000, 3)
    torch.testing.assert_close(queue.rows.norm(dim=1), torch.ones(2000))
    assert queue.rows.mean(0).norm() < 0.06  # in no direction: 1 / sqrt(2000) is 0.022
    rows = F.normalize(torch.randn(4, 3, requires_grad=True), dim=1)
    queue.push(rows)
    assert not queue.rows.requires_grad
    queue.push(rows.bfloat16())
    assert queue.rows.dtype == torch.float32 and not list(queue.parameters())
