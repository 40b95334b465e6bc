"""timm's BatchNorm with activation, in groups. Apart, since importing timm takes a second."""

from __future__ import annotations

from timm.layers import BatchNormAct2d
from torch import Tensor

from fastssl.networks.batch_norm import GroupedBatchNorm


class GroupedBatchNormAct(GroupedBatchNorm, BatchNormAct2d):
    """`GroupedBatchNorm`, then dropping and activation as in timm's BatchNormAct2d."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(self._normalise(x))) if self.training else BatchNormAct2d.forward(self, x)
