"""Methods: identities of the papers, heads, BatchNorm groups; and what every method must do."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from fastssl import methods
from fastssl.config import typed_config
from fastssl.core import make_method
from fastssl.methods import fastsiam, simsiam
from fastssl.nn import backbone
from loaders import Batch, UserError

SMALL = {"dim": 32, "hidden": 8}


def batch_of(K: int, B: int = 8, size: int = 32, dtype: torch.dtype = torch.float32) -> Batch:
    views = [torch.randn(B, 3, size, size).to(dtype, memory_format=torch.channels_last) for _ in range(K)]
    return Batch(views, None, torch.arange(B), torch.zeros(B, dtype=torch.int64))


def small(module, **options: object) -> nn.Module:
    torch.manual_seed(1)
    net, width = backbone("resnet18", zero_init_residual=False)
    return module.Method(net, width, module.Config(**(SMALL | options)))


def grads(method: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    method.zero_grad()
    loss, _ = method(batch)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in method.named_parameters()}


def test_fastsiam_with_two_views_is_simsiam() -> None:  # T1
    batch = batch_of(2)
    loss_s, grad_s = grads(small(simsiam), batch)
    loss_f, grad_f = grads(small(fastsiam, num_views=2), batch)
    assert torch.equal(loss_s, loss_f)
    assert grad_s.keys() == grad_f.keys()
    for name in grad_s:
        assert torch.equal(grad_s[name], grad_f[name]), name


def test_simsiam_is_its_equation() -> None:
    method, batch = small(simsiam), batch_of(2)
    loss, _ = copy.deepcopy(method)(batch)
    f, g, h = method.backbone, method.projector, method.predictor
    z1, z2 = g(f(batch.views[0])), g(f(batch.views[1]))
    p1, p2 = h(z1), h(z2)

    def D(p: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return -torch.nn.functional.cosine_similarity(p, z.detach()).mean()

    torch.testing.assert_close(loss, D(p1, z2) / 2 + D(p2, z1) / 2)


def test_fastsiam_is_its_equation() -> None:
    method, batch = small(fastsiam, num_views=4), batch_of(4)
    loss, _ = copy.deepcopy(method)(batch)
    z = [method.projector(method.backbone(v)) for v in batch.views]
    terms = []
    for i in range(4):
        target = torch.stack([z[j].detach() for j in range(4) if j != i]).mean(0)
        terms.append(-torch.nn.functional.cosine_similarity(method.predictor(z[i]), target).mean())
    torch.testing.assert_close(loss, torch.stack(terms).mean())


@pytest.mark.parametrize("module", [simsiam, fastsiam])
def test_no_gradient_flows_into_the_target(module) -> None:
    """With the predictor's output cut off nothing is left: the targets carry no gradient."""
    method, batch = small(module), batch_of(4 if module is fastsiam else 2)
    method.predictor = nn.Sequential(method.predictor, Cut())
    loss, _ = method(batch)
    assert not loss.requires_grad


class Cut(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach()


def test_each_view_has_its_own_batchnorm_statistics() -> None:
    """A view's z does not change when another view does, and one step updates running statistics K times."""
    method = small(fastsiam).train()
    seen: list[torch.Tensor] = []
    method.projector.register_forward_hook(lambda _m, _i, out: seen.append(out.detach().clone()))
    batch = batch_of(4)
    method(batch)
    first = seen[0]
    seen.clear()
    method(dataclasses.replace(batch, views=[batch.views[0], *[v * 5 + 1 for v in batch.views[1:]]]))
    assert torch.equal(seen[0], first)
    assert method.backbone.bn1.num_batches_tracked.item() == 8


def test_heads_of_simsiam() -> None:  # METHODS section 2
    net, width = backbone("resnet50")
    method = simsiam.Method(net, width, simsiam.Config())
    shapes = [tuple(m.weight.shape) for m in method.projector if isinstance(m, nn.Linear)]
    assert shapes == [(2048, 2048)] * 3
    assert all(m.bias is None for m in method.projector if isinstance(m, nn.Linear))
    norms = [m for m in method.projector if isinstance(m, nn.BatchNorm1d)]
    assert [n.affine for n in norms] == [True, True, False]
    assert sum(isinstance(m, nn.ReLU) for m in method.projector) == 2
    first, norm, relu, last = method.predictor
    assert (first.weight.shape, first.bias) == ((512, 2048), None)
    assert norm.affine and isinstance(relu, nn.ReLU)
    assert last.weight.shape == (2048, 512) and last.bias is not None
    cifar = simsiam.Method(*backbone("resnet18-cifar"), simsiam.Config(projector_layers=2))
    assert [tuple(m.weight.shape) for m in cifar.projector if isinstance(m, nn.Linear)] == [(2048, 512), (2048, 2048)]


def test_one_view_is_refused() -> None:
    with pytest.raises(UserError, match="2 or more"):
        fastsiam.Config(num_views=1).validate()


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'simsiam'"):
        methods.load("simsam")


# ------------------------------------------------------------------ every method, found by its file


@pytest.fixture(params=methods.available())
def any_method(request: pytest.FixtureRequest):
    config = typed_config(request.param)()
    config.model.method = request.param
    config.model.backbone, config.data.size = "resnet18", 32
    spec = methods.load(request.param).views(config.method_options, 32, "imagenet")
    return make_method(config), batch_of(spec.K)


def test_loss_falls_on_one_repeated_batch(any_method) -> None:
    method, batch = any_method
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(8):
        loss, metrics = method(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert all(not m.requires_grad and m.ndim == 0 for m in metrics.values())
    assert losses[-1] < losses[0] - 0.05


def test_every_parameter_belongs_to_one_group_and_gets_a_gradient(any_method) -> None:
    method, batch = any_method
    if hasattr(method, "param_groups"):
        ids = [id(p) for g in method.param_groups() for p in g["params"]]
        assert sorted(ids) == sorted(id(p) for p in method.parameters())
    loss, _ = method(batch)
    loss.backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", methods.available())
def test_views_follow_recipe_and_size(name: str) -> None:
    module = methods.load(name)
    for recipe in ("imagenet", "cifar"):
        spec = module.views(module.Config(), 48, recipe)
        assert spec.sizes == (48,) * spec.K
        assert (spec.views[0].blur_p > 0) == (recipe == "imagenet")
