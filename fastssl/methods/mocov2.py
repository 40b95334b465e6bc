"""MoCo v2: a view finds the momentum key of another one among a queue of keys.

He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020, eq. 1-2 and algorithm 1; Chen
et al., "Improved Baselines with Momentum Contrastive Learning", 2020. L = -log exp(q.k/T) / (exp(q.k/T) + sum_n
exp(q.n/T)), n the queue. View 0 gives the key, all others give queries: with small views and alpha this is SSLight's.

BatchNorm groups: each large view by itself, the small ones together; keys with the images shuffled over processes (and
over the --bn-splits parts of the batch).

Legend: B images, K views, T of them with keys, D projection channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import processes
from fastssl.device import at_least_fp32
from fastssl.losses.multicrop import MultiCrop, rebalanced_weights
from fastssl.losses.ops import feature_std, info_nce_queue, pair_loss
from fastssl.methods import base
from fastssl.networks.batch_norm import group_batch_norm, need_batch_norm_groups
from fastssl.networks.encode import encode, encode_shuffled, encode_together
from fastssl.networks.heads import init_linear, mlp
from fastssl.networks.momentum import Momentum, ema_update, momentum_copy
from fastssl.networks.queue import Queue
from fastssl.progress import Progress
from loaders import Batch, UserError
from loaders.checks import above_zero, at_least


@dataclass(kw_only=True)
class Config(MultiCrop, Momentum, base.MethodOptions):
    """Head, queue and keys (MoCo v2 section 3, MoCo section 3.3)."""

    dim: int = 128
    """Output of the projector, channels."""
    projector_hidden: int | None = None
    """Hidden layer of the projector, channels. None: as wide as the backbone's features."""
    projector_init: Literal["default", "vit"] = "default"
    """torch's initialisation, or a truncated normal of std 0.02 (SSLight's code)."""
    temperature: float = 0.2
    """T: similarities are divided by it."""
    queue_size: int = 65536
    """Keys in the queue: the negatives."""
    ema: float = 0.999
    """Momentum m of the key network."""
    symmetric: bool = False
    """Both large views give keys, and the directions are averaged (lightly's CIFAR benchmark)."""
    shuffle_bn: bool = True
    """Shuffle images over the processes for the keys, so that BatchNorm tells nothing (section 3.3)."""
    bn_splits: int = 1
    """Parts of a batch that BatchNorm normalises by themselves: one GPU needs them (MoCo's CIFAR demo: 8)."""

    def validate(self) -> None:
        """Raise UserError for values that make no sense."""
        super().validate()
        at_least(self, 1, "queue_size", "bn_splits", "dim", "projector_hidden")
        above_zero(self, "temperature")

    def check_batch(self, num: int) -> None:
        """Raise UserError if `num` images per process are not as many as the options need."""
        if num % self.bn_splits:
            raise UserError(
                f"a batch of {num} images does not split into --bn-splits {self.bn_splits} parts: change one of them"
            )


class Method(base.Method):
    """f, g, their momentum copies, the queue and the loss."""

    def __init__(self, backbone: nn.Module, width: int, config: Config):
        super().__init__(backbone, config.dim)
        if config.bn_splits > 1:
            need_batch_norm_groups(backbone, "--bn-splits")
            group_batch_norm(backbone, splits=config.bn_splits)
        self.config = config
        self.projector = mlp([width, config.projector_hidden or width, config.dim], bias="all", norm=False)
        if config.projector_init == "vit":
            init_linear(self.projector, 0.02, truncated=True)
        self.target_backbone = momentum_copy(self.backbone, config.target_init)
        self.target_projector = momentum_copy(self.projector, config.target_init)
        self.queue = Queue(config.queue_size, config.dim)

    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """f of the views that give queries, and the momentum copy's features of those that give keys."""
        views, with_keys = batch.views, 2 if self.config.symmetric else 1
        h = [encode(self.backbone, views[2 - with_keys : 2])]
        h += [encode_together(self.backbone, views[2:])] if views[2:] else []
        with torch.no_grad():
            shuffles = self.config.shuffle_bn and (processes.size() > 1 or self.config.bn_splits > 1)
            if shuffles:
                h_TBD = torch.stack([encode_shuffled(self.target_backbone, x) for x in views[:with_keys]])
            else:
                h_TBD = encode(self.target_backbone, views[:with_keys])
        return torch.cat(h), h_TBD

    def loss(self, h_MBD: Tensor, h_TBD: Tensor) -> tuple[Tensor, base.Metrics]:
        config, with_keys = self.config, len(h_TBD)
        q_MBD = self.projector(h_MBD)
        with torch.no_grad():
            k_TBD = F.normalize(at_least_fp32(self.target_projector(h_TBD)), dim=-1)
        w = rebalanced_weights(len(h_MBD) + 2 - with_keys, with_keys, config.alpha)[2 - with_keys :]
        distance = partial(info_nce_queue, queue_QD=self.queue.rows.clone(), temperature=config.temperature)
        loss = pair_loss(distance, q_MBD, k_TBD, w)
        for k_BD in k_TBD:  # after the look-up: no image is its own negative
            self.queue.push(processes.gather(k_BD))
        return loss, {"feature_std": feature_std(k_TBD)}

    def before_step(self, progress: Progress) -> None:
        pairs = [(self.target_backbone, self.backbone), (self.target_projector, self.projector)]
        ema_update(pairs, self.config.ema_at(progress))
