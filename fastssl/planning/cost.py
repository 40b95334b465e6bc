"""The cost of a run before it is run: view passes, floating-point operations, memory traffic and memory, counted on
tensors that have no memory.

`cost` is quick and for lists: the method's own forward pass says which images go through the backbone, at which size,
and whether a gradient comes back. `step_cost` goes through a whole training step, operation by operation.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastssl import methods
from fastssl.config import schema as configs
from fastssl.config.schema import RunConfig
from fastssl.device import pick_precision
from fastssl.networks.backbones import backbone
from fastssl.networks.batch_norm import group_batch_norm
from fastssl.progress import Progress
from fastssl.training.build import make_method, make_views
from fastssl.training.step import Step
from loaders import Batch, ViewSpec
from loaders.augment import divide

# An assumption, not a measurement: what planning/cards.py derives for ResNet-50, 640 views of 224 px per second.
ASSUMED_CARD, ASSUMED_VIEWS_PER_S, ASSUMED_FLOPS_PER_S = "RTX 2080 Ti", 640, 15.7e12
_TRAINED = 3  # forward, and two products for each of its products in the backward pass


@dataclass(frozen=True)
class Cost:
    """The cost of a whole run."""

    views: int
    """View passes: images x epochs x views of an image, small crops included."""
    flops: float
    """Floating-point operations of all networks, a multiplication and an addition counting as two."""

    @property
    def hours(self) -> float:
        """Hours on the assumed card."""
        return self.flops / ASSUMED_FLOPS_PER_S / 3600


def cost(config: RunConfig, num_images: int) -> Cost:
    """The cost of `config` on a data set of `num_images`."""
    images, spec = num_images * config.optim.epochs, make_views(config)
    # Recipes that differ in epochs or rates are counted once.
    alike = repr((config.model, config.method_options, config.data.size, config.data.batch_size, spec))
    if alike not in _counted:
        _counted[alike] = _flops_per_image(config, spec)
    return Cost(images * spec.K, images * _counted[alike])


_counted: dict[str, float] = {}


def _flops_per_image(config: RunConfig, spec: ViewSpec) -> float:
    """Floating-point operations of one image in one step: three times the forward pass of networks that are trained,
    once that of networks that only make targets; heads and the products in the loss included."""
    model, num = config.model.backbone, config.data.batch_size
    calls: Counter = Counter()  # images through the backbone by ((height, width), whether they are trained on)

    def note(x: Tensor) -> None:
        calls[tuple(x.shape[2:]), torch.is_grad_enabled()] += len(x)

    with torch.device("meta"):
        width = _network(model, config.data.size)[1]
        method = methods.load(config.model.method).Method(_StandIn(width, note), width, config.method_options)
        views = [torch.empty(num, 3, size, size) for size in spec.sizes]
        tiles = None
        if spec.divide > 1:
            sides = [size // spec.divide for size in spec.sizes]
            tiles = [torch.empty(num * spec.divide**2, 3, side, side) for side in sides]
        with FlopCounter() as counter:
            method(Batch(views, tiles, torch.empty(num), torch.empty(num)))
    flops = counter.flops + (_TRAINED - 1) * counter.trained_flops
    for (sides, trained), images in calls.items():
        flops += images * _forward(model, config.data.size, sides) * (_TRAINED if trained else 1)
    return flops / num


@functools.cache
def _network(model: str, size: int) -> tuple[nn.Module, int]:
    """The backbone of a run on images of `size` px, without memory, and its width."""
    with torch.device("meta"):
        return backbone(model, size=size)


@functools.cache
def _forward(model: str, size: int, sides: tuple[int, int]) -> int:
    """Operations of the forward pass of one image of `sides` px."""
    net, _ = _network(model, size)
    with torch.no_grad(), FlopCounter() as counter:
        net.eval()(torch.empty(1, 3, *sides, device="meta"))
    return counter.flops


class _StandIn(nn.Module):
    """A stand-in for a backbone: features of the same width, and a note of every call."""

    def __init__(self, width: int, note: Callable[[Tensor], None]):
        super().__init__()
        self.note = note  # a function, which copies of this module share
        self.features = nn.Parameter(torch.empty(1, width))

    def forward(self, x: Tensor) -> Tensor:
        self.note(x)
        return self.features.expand(len(x), -1)


# ------------------------------------------------------------------ one step, operation by operation


@dataclass(frozen=True)
class StepCost:
    """The cost of one training step in eager torch, which does one operation after another."""

    flops: float
    """Floating-point operations per image, forward and backward, a multiplication and an addition counting as two."""
    bytes: float
    """Memory traffic per image: what every operation reads and writes."""
    peak: float
    """Most memory that is in use at once during the step, bytes: weights, gradients, optimiser, activations."""
    operations: float
    """Operations per image that the device is asked for."""


def step_cost(config: RunConfig) -> StepCost:
    """The cost of a step of `config`, with half precision where autocast uses it, counted on tensors without memory.

    The step is the run's own `Step`, with its momentum copies, micro-batches and recomputed activations.
    """
    config = configs.replace(config, compile="off", sync_bn=False)
    spec, num = make_views(config), config.data.batch_size
    cpu = torch.device("cpu")  # where fake tensors pretend to be: autocast does not know the meta device
    with torch.device("meta"):
        method = make_method(config)
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the real step gives its own warnings
        method.to_empty(device=cpu)
        step = Step(config, method, cpu, pick_precision("bf16", cpu))
        # Once fused, groups move as many bytes as one group.
        group_batch_norm(step.method, joint=True, splits=1, images=None)
        views = [torch.empty(num, size, size, 3).permute(0, 3, 1, 2).bfloat16() for size in spec.sizes]
        tiles = [divide(view, spec.divide) for view in views] if spec.divide > 1 else None
        batch = Batch(views, tiles, torch.arange(num), torch.zeros(num, dtype=torch.int64))
        with Meter((step.method.state_dict(), step.optimizer.state_dict(), views, tiles)) as meter:
            step(batch, Progress(0, 1, 1))
    return StepCost(meter.flops / num, meter.bytes / num, meter.peak, meter.operations / num)


class FlopCounter(TorchDispatchMode):
    """Floating-point operations of everything that is computed in a `with` block, by torch's own formulas.

    torch's FlopCounterMode does not tell what runs with gradients from what does not, and takes the backward pass of a
    grouped convolution for that of a dense one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.trained_flops = 0
        """Those of operations that ran with gradients switched on."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet, flops = func.overloadpacket, 0
        if packet is aten.convolution_backward:
            flops = _convolution_backward(*args)
        elif packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=out)
        self.flops += flops
        self.trained_flops += flops if torch.is_grad_enabled() else 0
        return out


class Meter(FlopCounter):
    """Floating-point operations, memory traffic and memory in use of everything that is computed in a `with` block.

    Convolutions and matrix products touch each operand once. BatchNorm reads its input twice, as it needs the
    statistics first. Views, empty copies and allocations cost nothing. `existing`: tensors, in containers, whose memory
    is in use from the beginning.
    """

    def __init__(self, existing: Any = ()) -> None:
        super().__init__()
        self.bytes, self.peak, self.operations = 0, 0, 0
        self._living: dict[int, int] = {}  # bytes by storage
        self._in_use = 0
        self._note(existing)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self._note(out)
        packet = func.overloadpacket
        if not func.is_view and packet not in _FREE:
            self.operations += 1
            self.bytes += (2 if packet in _TWICE else 1) * _bytes((args, kwargs)) + _bytes(out)
        return out

    def _note(self, values: Any) -> None:
        """Count memory that is not known yet, until it is freed."""
        for tensor in _tensors(values):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._living:
                self._living[storage._cdata] = storage.nbytes()
                self._in_use += storage.nbytes()
                self.peak = max(self.peak, self._in_use)
                weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self._in_use -= self._living.pop(key)


aten, prim = torch.ops.aten, torch.ops.prim
_FREE = {prim.device, aten.detach, aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty}
_FREE |= {aten.new_empty_strided, aten._unsafe_view, aten.as_strided_}
_TWICE = {aten.native_batch_norm, aten.native_batch_norm_backward, aten._native_batch_norm_legit}


def _convolution_backward(grad: Tensor, _x: Tensor, weight: Tensor, *rest: Any) -> int:
    """Operations of those gradients (of input and weight) that are asked for."""
    *_, mask = rest
    return 2 * grad.numel() * weight[0].numel() * sum(mask[:2])


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors in nested containers."""
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _bytes(values: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(values))
