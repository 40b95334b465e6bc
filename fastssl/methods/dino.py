"""DINO: a student predicts the centred, sharpened output of its momentum teacher on another view.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021; eq. 1-4, algorithm 1, appendix C.
L = mean over pairs (teacher view g large, student view v != g) of -sum_k softmax((t_g - c) / T_t)_k log softmax(s_v /
T_s)_k; c <- 0.9 c + 0.1 mean of the teacher's outputs, after the loss. Pairs weigh as SSLight has it.

BatchNorm groups: views of one size together in the backbone, all views together in the head; in the teacher too, which
is in train mode.

Legend: B images of this process, K views, D bottleneck channels, P prototypes (outputs).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import processes
from fastssl.conditions import JOINT, above, given, unlike
from fastssl.device import at_least_fp32
from fastssl.losses.multicrop import MultiCrop, rebalanced_weights
from fastssl.losses.ops import cross_entropy, feature_std, pair_loss
from fastssl.methods import base
from fastssl.networks.encode import all_views, encode_together
from fastssl.networks.heads import WeightNormLinear, init_linear, mlp
from fastssl.networks.momentum import Momentum, Schedule, ema_update, momentum_copy
from fastssl.progress import Progress
from loaders import Batch
from loaders.checks import above_zero, at_least, share


@dataclass(kw_only=True)
class Config(MultiCrop, Momentum, base.MethodOptions):
    """Head, temperatures and centre (section 3.1, appendix C and the code)."""

    dim: int = 256
    """Bottleneck before the prototypes, channels."""
    projector_layers: int = 3
    """Linear layers up to the bottleneck."""
    projector_hidden: int = 2048
    """Hidden layers, channels."""
    projector_bn: bool = True
    """BatchNorm in the hidden layers: on for convolutional networks, off for ViTs."""
    prototypes: int = 65536
    """P: outputs (4096 for SSLight's convolutional networks)."""
    train_last_norm: bool = False
    """Train the length of the last layer's rows (on in SSLight's ViTs); off is more stable."""
    decay_last_norm: bool = False
    """Let weight decay reach that length under --no-decay 1d, too, as in DINO's and SSLight's code, where it has two
    axes."""
    student_temperature: float = 0.1
    """T_s."""
    teacher_temperature: float = 0.04
    """T_t after its warm-up."""
    teacher_warmup_temperature: float = 0.04
    """T_t at the start."""
    teacher_warmup_epochs: int = 0
    """Epochs in which T_t changes, once per epoch."""
    center_momentum: float = 0.9
    """How slowly the centre follows the teacher's mean output."""
    freeze_epochs: int = 1
    """The last layer does not move before this epoch."""
    ema: float = 0.996
    """Momentum m of the teacher."""
    ema_schedule: Schedule = "cosine"
    """constant, or cosine: rising to 1 over the run (section 3.1)."""

    READ_IF = JOINT | {
        **dict.fromkeys(("projector_hidden", "projector_bn"), above("projector_layers", 1)),
        "decay_last_norm": given("train_last_norm"),
        "teacher_warmup_temperature": above("teacher_warmup_epochs", 0),
        "teacher_warmup_epochs": unlike("teacher_warmup_temperature", "teacher_temperature"),
    }

    def validate(self) -> None:
        """Raise UserError for values that make no sense."""
        super().validate()
        at_least(self, 1, "dim", "projector_layers", "projector_hidden", "prototypes")
        above_zero(self, "student_temperature", "teacher_temperature", "teacher_warmup_temperature")
        share(self, "center_momentum")


class Method(base.Method):
    """Student and teacher, the centre and the loss."""

    center: Tensor
    off_center: Tensor
    num_parts: Tensor
    teacher_temperature: Tensor

    separable = True  # the centre is of the steps before

    def __init__(self, backbone: nn.Module, width: int, config: Config):
        super().__init__(backbone, config.dim)
        self.config = config
        hidden = [config.projector_hidden] * (config.projector_layers - 1)
        self.projector = mlp([width, *hidden, config.dim], bias="all", norm=config.projector_bn, activation=nn.GELU)
        init_linear(self.projector, 0.02, truncated=True)
        self.prototypes = WeightNormLinear(
            config.dim, config.prototypes, trainable=config.train_last_norm, decays=config.decay_last_norm
        )
        self.target_backbone = momentum_copy(self.backbone, config.target_init)
        self.target_projector = momentum_copy(self.projector, config.target_init)
        self.target_prototypes = momentum_copy(self.prototypes, config.target_init)
        self.register_buffer("center", torch.zeros(config.prototypes))
        # How far the teacher's mean outputs are from it: the sum over this step's micro-batches, and their number.
        self.register_buffer("off_center", torch.zeros(config.prototypes), persistent=False)
        self.register_buffer("num_parts", torch.zeros(()), persistent=False)
        # A tensor, so that a compiled loss serves all temperatures.
        self.register_buffer("teacher_temperature", torch.tensor(teacher_temperature(config, 0)), persistent=False)

    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The student's features of all views, the teacher's of the large ones."""
        with torch.no_grad():
            h_2BD = encode_together(self.target_backbone, batch.views[:2])
        return encode_together(self.backbone, batch.views), h_2BD

    def loss(self, h_KBD: Tensor, h_2BD: Tensor) -> tuple[Tensor, base.Metrics]:
        config, num_views = self.config, len(h_KBD)
        z_KBD = F.normalize(all_views(self.projector, h_KBD), dim=-1)
        s_KBP = self.prototypes(z_KBD)
        with torch.no_grad():
            z_2BD = F.normalize(all_views(self.target_projector, h_2BD), dim=-1)
            t_2BP = at_least_fp32(self.target_prototypes(z_2BD))
            q_2BP = F.softmax((t_2BP - self.center) / self.teacher_temperature, -1)
        log_p_KBP = F.log_softmax(at_least_fp32(s_KBP) / config.student_temperature, -1)
        loss = pair_loss(cross_entropy, log_p_KBP, q_2BP, rebalanced_weights(num_views, 2, config.alpha))
        self.off_center.add_(t_2BP.mean((0, 1)) - self.center)
        self.num_parts.add_(1)
        return loss, {"feature_std": feature_std(z_KBD)}

    def before_step(self, progress: Progress) -> None:
        self.teacher_temperature.fill_(teacher_temperature(self.config, progress.epoch))
        self.off_center.zero_()
        self.num_parts.zero_()

    def after_backward(self, progress: Progress) -> None:
        off_P = processes.mean_over_processes(self.off_center / self.num_parts.clamp(min=1))
        self.center.add_(off_P, alpha=1 - self.config.center_momentum)
        if progress.epoch < self.config.freeze_epochs:
            for p in self.prototypes.parameters():
                p.grad = None

    def after_step(self, progress: Progress) -> None:
        pairs = [
            (self.target_backbone, self.backbone),
            (self.target_projector, self.projector),
            (self.target_prototypes, self.prototypes),
        ]
        ema_update(pairs, self.config.ema_at(progress))


def teacher_temperature(config: Config, epoch: int) -> float:
    """T_t of an epoch: linear from its start to its end over the warm-up epochs (DINO's code)."""
    start, end, epochs = config.teacher_warmup_temperature, config.teacher_temperature, config.teacher_warmup_epochs
    if epoch >= epochs:
        return end
    return start + (end - start) * epoch / max(1, epochs - 1)
