"""What a run costs before it is run: view passes, and floating-point operations counted on the meta device.

Nothing is tabled: the method's own forward pass says which images go through the backbone, at which size, and whether a
gradient comes back.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fastssl import methods
from fastssl.backbones import backbone
from fastssl.config import Config
from fastssl.core import make_views
from loaders import Batch, ViewSpec

# An assumption, not a measurement: 500 ResNet-50 views of 224 px per second, forward and backward, in fp16.
ASSUMED_CARD, ASSUMED_FLOPS_PER_S = "RTX 2080 Ti", 12.3e12
_TRAINED = 3  # forward, and two products for each of its products in the backward pass


@dataclass(frozen=True)
class Cost:
    """Of a whole run."""

    views: int
    """View passes: images x epochs x views of an image, small crops included."""
    flops: float
    """Floating-point operations of all networks, a multiplication and an addition counting as two."""

    @property
    def hours(self) -> float:
        """On the assumed card."""
        return self.flops / ASSUMED_FLOPS_PER_S / 3600


def cost(config: Config, num_images: int) -> Cost:
    """The cost of `config` on a data set of `num_images`."""
    images, spec = num_images * config.optim.epochs, make_views(config)
    # Recipes that differ in epochs or rates are counted once.
    alike = repr((config.model, config.method_options, config.data.size, config.data.batch_size, spec))
    if alike not in _counted:
        _counted[alike] = _flops_per_image(config, spec)
    return Cost(images * spec.K, images * _counted[alike])


_counted: dict[str, float] = {}


def _flops_per_image(config: Config, spec: ViewSpec) -> float:
    """Floating-point operations of one image in one step: three times the forward pass of what is trained, once that of
    what only makes targets; heads and the products in the loss included."""
    model, num = config.model.backbone, config.data.batch_size
    calls: Counter = Counter()  # images through the backbone by ((height, width), whether they are trained on)

    def note(x: Tensor) -> None:
        calls[tuple(x.shape[2:]), torch.is_grad_enabled()] += len(x)

    with torch.device("meta"):
        width = _network(model, config.data.size)[1]
        method = methods.load(config.model.method).Method(_Noted(width, note), width, config.method_options)
        views = [torch.empty(num, 3, size, size) for size in spec.sizes]
        tiles = None
        if spec.divide > 1:
            sides = [size // spec.divide for size in spec.sizes]
            tiles = [torch.empty(num * spec.divide**2, 3, side, side) for side in sides]
        with _FlopCounter() as counter:
            method(Batch(views, tiles, torch.empty(num), torch.empty(num)))
    flops = counter.flops
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
    with torch.no_grad(), _FlopCounter() as counter:
        net.eval()(torch.empty(1, 3, *sides, device="meta"))
    return counter.flops


class _FlopCounter(TorchDispatchMode):
    """Adds up what torch counts for each operation, with its backward pass where gradients are on."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out) * (_TRAINED if torch.is_grad_enabled() else 1)
        return out


class _Noted(nn.Module):
    """Stands in for a backbone: features of its width, and a note of every call."""

    def __init__(self, width: int, note: Callable[[Tensor], None]):
        super().__init__()
        self.note = note  # a function, which copies of this module share
        self.features = nn.Parameter(torch.empty(1, width))

    def forward(self, x: Tensor) -> Tensor:
        self.note(x)
        return self.features.expand(len(x), -1)
