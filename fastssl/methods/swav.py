"""SwAV: the codes of one view, balanced over prototypes, are predicted from the other views.

Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", NeurIPS 2020; eq. 1-3 and
section 3. L = mean over pairs (i large, v != i) of -sum_k q_ik log softmax(z_v C / T)_k, codes q from Sinkhorn-Knopp
over the images of all processes (and a queue of earlier ones), without gradient. Pairs weigh as SSLight has it.

BatchNorm groups: views of one size together in the backbone, all views together in the projector.

Legend: B images of this process, K views, D projection channels, P prototypes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import processes
from fastssl.conditions import JOINT, above
from fastssl.device import at_least_fp32
from fastssl.losses.multicrop import MultiCrop, rebalanced_weights
from fastssl.losses.ops import cross_entropy, feature_std, pair_loss, sinkhorn
from fastssl.methods import base
from fastssl.networks.encode import all_views, encode_together
from fastssl.networks.heads import init_linear, mlp
from fastssl.networks.queue import Queue
from fastssl.progress import Progress
from loaders import Batch
from loaders.checks import above_zero, at_least


@dataclass(kw_only=True)
class Config(MultiCrop, base.MethodOptions):
    """Head, prototypes and codes (section 4 and appendix A)."""

    dim: int = 128
    """Output of the projector, channels."""
    projector_hidden: int = 2048
    """Hidden layer of the projector, channels (4096 in SSLight)."""
    projector_init: Literal["default", "normal"] = "default"
    """How projector and prototypes start: torch's initialisation, or a normal of std 0.01 with biases 0 (SSLight)."""
    prototypes: int = 3000
    """P: cluster centres."""
    temperature: float = 0.1
    """T: scores are divided by it before the softmax."""
    epsilon: float = 0.05
    """Smoothness of the codes: scores are divided by it before Sinkhorn-Knopp."""
    sinkhorn_iterations: int = 3
    """Rounds of normalising columns and rows."""
    freeze_epochs: float = 1.0
    """The prototypes do not move before this epoch (SwAV's code: its first 313 steps of 4096 images, which is one)."""
    queue_size: int = 0
    """Earlier projections that codes are balanced over, of all processes: for batches that are small beside P."""
    queue_from_epoch: int = 15
    """The queue begins to fill in this epoch, and serves when it is full."""

    READ_IF = JOINT | {"queue_from_epoch": above("queue_size", 0)}

    def validate(self) -> None:
        """Raise UserError for values that make no sense."""
        super().validate()
        above_zero(self, "temperature", "epsilon")
        at_least(self, 1, "dim", "projector_hidden", "prototypes", "sinkhorn_iterations")
        at_least(self, 0, "queue_size")


class Method(base.Method):
    """f, g, the prototypes, the queues of both large views, and the loss."""

    def __init__(self, backbone: nn.Module, width: int, config: Config):
        super().__init__(backbone, config.dim)
        self.config = config
        self.projector = mlp([width, config.projector_hidden, config.dim], bias="all")
        self.prototypes = nn.Linear(config.dim, config.prototypes, bias=False)
        if config.projector_init == "normal":
            init_linear(self.projector, 0.01)
            init_linear(self.prototypes, 0.01)
        self.queues = nn.ModuleList(Queue(config.queue_size, config.dim) for _ in range(2 if config.queue_size else 0))
        self.steps_filling = -1  # steps since the queues began to fill; before that, negative
        self.queue_state: Literal["waits", "fills", "serves"] = "waits"

    def features(self, batch: Batch) -> tuple[Tensor]:
        """f of all views."""
        if self.queues and self.steps_filling >= 0:
            full = self.steps_filling * len(batch.views[0]) * processes.size() >= self.config.queue_size
            self.queue_state = "serves" if full else "fills"
        return (encode_together(self.backbone, batch.views),)

    def loss(self, h_KBD: Tensor) -> tuple[Tensor, base.Metrics]:
        config, num_views = self.config, len(h_KBD)
        with torch.no_grad():
            self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))
        z_KBD = F.normalize(at_least_fp32(all_views(self.projector, h_KBD)), dim=-1)
        scores_KBP = self.prototypes(z_KBD)
        q_2BP = torch.stack([self.codes(scores_KBP[i].detach(), z_KBD[i].detach(), i) for i in range(2)])
        log_p_KBP = F.log_softmax(at_least_fp32(scores_KBP) / config.temperature, -1)
        loss = pair_loss(cross_entropy, log_p_KBP, q_2BP, rebalanced_weights(num_views, 2, config.alpha))
        return loss, {"feature_std": feature_std(z_KBD)}

    @torch.no_grad()
    def codes(self, scores_BP: Tensor, z_BD: Tensor, i: int) -> Tensor:
        """q_BP of large view i: balanced over the batch and, when it is full, over the queue before it."""
        config, rows = self.config, scores_BP
        if self.queue_state != "waits":
            queue = cast(Queue, self.queues[i])
            if self.queue_state == "serves":
                own = queue.rows[processes.rank() :: processes.size()]  # a share for each process
                rows = torch.cat([self.prototypes(own), rows])
            queue.push(processes.gather(z_BD))
        return sinkhorn(rows, config.epsilon, config.sinkhorn_iterations, processes.sum_over_processes)[-len(z_BD) :]

    def before_step(self, progress: Progress) -> None:
        self.steps_filling = progress.step - self.config.queue_from_epoch * progress.steps_per_epoch

    def after_backward(self, progress: Progress) -> None:
        if progress.step < self.config.freeze_epochs * progress.steps_per_epoch:
            self.prototypes.weight.grad = None
