"""What a method is, and what its options are: the base classes of every file in this folder.

Legend: B images of this process, K views, D features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastssl.progress import Progress
from loaders import Batch, ViewSpec
from loaders.checks import Options
from loaders.views import Recipe

Metrics = dict[str, Tensor]
"""Detached scalars to log, by name, on the device."""


class MethodOptions(Options):
    """Options of a method. Each field becomes a command-line flag; its docstring is the flag's help."""

    def views(self, recipe: Recipe) -> ViewSpec:
        """The views that the method asks of a loader; recipe(K) gives K large ones."""
        return recipe(2)

    def check_network(self, net: nn.Module, size: int) -> None:
        """Raise UserError if the options need something that the backbone `net` does not have at views of `size` px."""

    def check_batch(self, num: int) -> None:
        """Raise UserError if the options do not go with `num` images per process and step."""


class Method(nn.Module):
    """A backbone, what is trained beside it, and a loss. Built with (backbone, width of its features, options).

    A subclass sets `output_width` and writes the two halves of its forward pass: `features`, the passes of the networks
    that see images, and `loss`, all that follows, which is compiled as one graph.
    """

    separable = False
    """The loss is a mean over images that meet in BatchNorm only, so that gradients of parts of a batch add up."""

    def __init__(self, backbone: nn.Module, output_width: int):
        super().__init__()
        self.backbone = backbone
        self.output_width = output_width
        """Channels of the outputs whose std is logged as `feature_std`."""

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The loss of a batch, a scalar, and what to log."""
        return self.loss(*self.features(batch))

    def features(self, batch: Batch) -> Sequence[Any]:
        """Arguments of `loss`: the backbone's features of the batch's views."""
        raise NotImplementedError(f"{type(self).__module__} defines no features(batch)")

    def loss(self, *features: Any) -> tuple[Tensor, Metrics]:
        """The loss, a scalar, and what to log, from what `features` returned."""
        raise NotImplementedError(f"{type(self).__module__} defines no loss(...)")

    @property
    def healthy_std(self) -> float:
        """1/sqrt(D): the std of outputs that are spread evenly over the sphere (SimSiam section 4.1); 0 is collapse."""
        return 1 / math.sqrt(self.output_width)

    def image_networks(self) -> list[nn.Module]:
        """Networks that see images: `backbone` and, in methods with momentum targets, its copy `target_backbone`."""
        return [net for name, net in self.named_children() if name in ("backbone", "target_backbone")]

    def param_groups(self) -> list[dict[str, Any]]:
        """Groups {"params": [...], "fixed_lr": bool} for the optimiser; fixed_lr keeps the initial rate."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "fixed_lr": False}]

    def before_step(self, progress: Progress) -> None:
        """Prepare a step, before the forward pass: momentum targets, temperatures."""

    def after_backward(self, progress: Progress) -> None:
        """Act on gradients before the optimiser does, such as drop some that it must not see."""

    def after_step(self, progress: Progress) -> None:
        """Follow a step of the optimiser: momentum targets that copy the new weights."""
