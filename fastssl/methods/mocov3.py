"""MoCo v3: each view finds the other one's momentum key among the keys of all images.

Chen, Xie and He, "An Empirical Study of Training Self-Supervised Vision Transformers", ICCV 2021; algorithm 1.
L = 2 T (CE(q_1, k_2) + CE(q_2, k_1)), CE over q.k / T of the batch's keys, q = h(g(f(x))), k from the momentum copy.

BatchNorm groups: each view by itself, in the target too, which is in train mode.

Legend: B images of this process, N of all processes, T target views, M queries per image, D projection channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from fastssl import processes
from fastssl.losses.ops import feature_std, info_nce, pair_loss
from fastssl.losses.pairs import pair_weights
from fastssl.losses.patches import Features, predictions
from fastssl.methods import byol
from fastssl.networks.heads import OutputNorm, PredictorBias
from loaders.checks import above_zero


@dataclass(kw_only=True)
class Config(byol.Config):
    """Heads of MoCo v3's ResNet-50 (its code: two layers each without biases, BatchNorm on the projector's output)."""

    projector_bias: bool = False
    """Biases in the projector's Linear layers."""
    projector_norm: OutputNorm = "fixed"
    """BatchNorm on the projector's output: none, fixed (no scale and shift), affine."""
    predictor_bias: PredictorBias = "none"
    """Which Linear layers of the predictor have biases."""
    temperature: float = 1.0
    """T: similarities are divided by it (1.0 for ResNet-50, 0.2 for ViTs)."""
    sum_directions: bool = True
    """2 T times the sum over the two directions (MoCo v3's code). Off: the mean over all terms (Fast-MoCo's)."""

    def validate(self) -> None:
        """Raise UserError for values that make no sense."""
        super().validate()
        above_zero(self, "temperature")


class Method(byol.Method):
    """BYOL's networks under a contrastive loss."""

    separable = False  # the other images are the negatives

    def loss(self, online: list[Features], h_TBD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        p_MBD, _, owner_M = predictions(self.projector, self.predictor, online, self.config)
        z_TBD = self.targets(h_TBD)
        k_TND = [processes.gather(z_BD) for z_BD in z_TBD]
        own_B = processes.own_rows(z_TBD.shape[1], z_TBD.device)
        distance = partial(info_nce, temperature=self.config.temperature, positives=own_B)
        loss = pair_loss(distance, p_MBD, k_TND, pair_weights(owner_M, z_TBD, self.config))
        if self.config.sum_directions:
            loss = 4 * self.config.temperature * loss
        return loss, {"feature_std": feature_std(z_TBD)}
