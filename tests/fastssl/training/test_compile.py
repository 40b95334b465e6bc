"""What is compiled: everything behind the backbone is one graph, and computes what the eager form does."""

from __future__ import annotations

import copy

import pytest
import torch
from small import cases, made
from torch import Tensor, nn

from fastssl.networks.batch_norm import group_batch_norm
from fastssl.progress import Progress
from fastssl.training.step import compile_method
from loaders import Batch

VARIANTS: tuple[dict[str, object], ...] = (
    {},
    {"patches": "divide-encode-combine"},
    {"guided": "guided", "guided_views": 2},
    {"num_local": 2, "local_size": 32},
    {"queue_size": 16, "queue_from_epoch": 0},
)
CASES = cases(VARIANTS, {})


def passes(method: nn.Module, batch: Batch) -> list[tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]]:
    """Losses, gradients and buffers of three steps."""
    seen = []
    for i in range(3):
        torch.manual_seed(i)
        method.before_step(Progress(i, 3, 1))
        loss, _ = method(Batch([v.roll(i, 0) for v in batch.views], None, batch.index, batch.label))
        method.zero_grad()
        loss.backward()
        grads = {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}
        seen.append((loss.detach(), grads, {n: b.clone() for n, b in method.named_buffers()}))
    return seen


@pytest.mark.parametrize("case", CASES)
def test_heads_and_loss_are_one_graph(case: str) -> None:
    """No graph break, and no recompilation from step to step but those that a queue's three states need."""
    torch.compiler.reset()
    name, options = CASES[case]
    _, eager, batch = made(name, B=8, **options)
    group_batch_norm(eager)
    compiled, graphs = copy.deepcopy(eager), []

    def count(graph: torch.fx.GraphModule, _inputs: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled.loss = torch.compile(compiled.loss, backend=count, fullgraph=True)
    found, expected = passes(compiled, batch), passes(eager, batch)
    assert len(graphs) <= (2 if "queue_from_epoch" in options else 1)
    for (loss, grads, buffers), (loss_, grads_, buffers_) in zip(found, expected, strict=True):
        torch.testing.assert_close(loss, loss_, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grads, grads_, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(buffers, buffers_, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["fastsiam", "mocov3", "dino"])
def test_a_compiled_method_trains_like_an_eager_one(name: str) -> None:
    """Backbone and loss through the tracing and the backward graphs of the compiler; names of the state stay."""
    torch.compiler.reset()
    _, eager, batch = made(name, B=8)
    group_batch_norm(eager)
    compiled = copy.deepcopy(eager)
    compile_method(compiled, backend="aot_eager")
    assert list(compiled.state_dict()) == list(eager.state_dict())
    for (loss, grads, buffers), (loss_, grads_, buffers_) in zip(
        passes(compiled, batch), passes(eager, batch), strict=True
    ):
        torch.testing.assert_close(loss, loss_, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(grads, grads_, rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(buffers, buffers_, rtol=1e-3, atol=1e-4)
