"""NNCLR: the positive of a view is the nearest neighbour of the other one among recent images.

Dwibedi et al., "With a Little Help from My Friends: Nearest-Neighbor Contrastive Learning of Visual Representations",
ICCV 2021; eq. 2-4. L = 1/2 CE(NN(z_1), p_2) + 1/2 CE(NN(z_2), p_1), CE(n, p) over n.p / T of the batch's predictions,
NN(z) the row of the queue with the largest cosine. The queue takes in z_1 after the look-up. No momentum network.

BatchNorm groups: each view by itself.

Legend: B images of this process, N of all processes, T target views, M predictions per image, Q queue rows, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import processes
from fastssl.device import at_least_fp32
from fastssl.losses.ops import feature_std, info_nce, pair_loss
from fastssl.losses.pairs import PairConfig
from fastssl.methods import base
from fastssl.networks.heads import OutputNorm, head_groups, make_heads
from fastssl.networks.queue import Queue
from loaders import Batch
from loaders.checks import above_zero, at_least


@dataclass(kw_only=True)
class Config(PairConfig, base.MethodOptions):
    """Heads of NNCLR (section 4.1: 2048-2048-256 with BatchNorm in g, 4096-256 in h)."""

    dim: int = 256
    """Output of projector and predictor, channels."""
    projector_hidden: int | None = 2048
    """Hidden layers of the projector, channels. None: as wide as the backbone's features."""
    projector_norm: OutputNorm = "affine"
    """BatchNorm on the projector's output: none, fixed (no scale and shift), affine."""
    predictor_hidden: int = 4096
    """Hidden layer of the predictor, channels."""
    fix_pred_lr: bool = False
    """Keep the predictor's learning rate at its initial value, without warm-up."""
    temperature: float = 0.1
    """T: similarities are divided by it."""
    queue_size: int = 98304
    """Q: recent projections among which neighbours are looked up."""

    def validate(self) -> None:
        """Raise UserError for values that make no sense."""
        super().validate()
        above_zero(self, "temperature")
        at_least(self, 1, "queue_size")


class Method(base.Method):
    """f, g, h, the queue of projections, and the loss."""

    def __init__(self, backbone: nn.Module, width: int, config: Config):
        super().__init__(backbone, config.dim)
        self.config = config
        self.projector, self.predictor = make_heads(width, config)
        self.queue = Queue(config.queue_size, config.dim)
        self.steps = config.steps(siamese=True)

    def features(self, batch: Batch) -> tuple[Any]:
        return (self.steps.encode(self.backbone, batch),)

    def loss(self, h: Any) -> tuple[Tensor, base.Metrics]:
        z = self.steps.project(self.projector, h)
        p_MBD = self.steps.predict(self.predictor, z)
        z_TBD = self.steps.targets(z)
        n_TBD = self.neighbours(z_TBD)
        own_B = processes.own_rows(z_TBD.shape[1], z_TBD.device)

        def cross_entropy(p_mBD: Tensor, n_BD: Tensor) -> Tensor:  # the neighbour looks for its prediction
            return torch.stack(
                [info_nce(n_BD, processes.gather_with_grad(p_BD), self.config.temperature, own_B) for p_BD in p_mBD]
            )

        loss = pair_loss(cross_entropy, p_MBD, n_TBD, self.steps.weights(z, z_TBD))
        self.queue.push(processes.gather(F.normalize(at_least_fp32(z_TBD[0]), dim=1)))
        return loss, {"feature_std": feature_std(z_TBD)}

    @torch.no_grad()
    def neighbours(self, z_TBD: Tensor) -> Tensor:
        """NN(z): for every projection the queue's row with the largest cosine (eq. 3)."""
        nearest_TB = (F.normalize(at_least_fp32(z_TBD), dim=-1) @ self.queue.rows.T).argmax(-1)
        return self.queue.rows[nearest_TB]

    def param_groups(self) -> list[dict[str, Any]]:
        return head_groups(self, self.predictor, self.config.fix_pred_lr)
