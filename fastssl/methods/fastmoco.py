"""Fast-MoCo: MoCo v3 whose queries are combinations of 2 x 2 tiles.

Ci et al., "Fast-MoCo: Boost Momentum-based Contrastive Learning with Combinatorial Patches", ECCV 2022; section 3.2.
L = mean over the 2 C(n^2, m) pairs of CE(q_c, k), CE over q.k / T of the batch's keys: of every view, all combinations
c of m tiles against the whole other view. With n = m = 1 and the sum of both directions this is MoCo v3.

BatchNorm groups: all tiles of a view in the backbone, all its combinations in the heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastssl.losses.patches import Variant
from fastssl.methods import mocov3
from fastssl.networks.heads import OutputNorm, PredictorBias
from fastssl.networks.momentum import Schedule


@dataclass(kw_only=True)
class Config(mocov3.Config):
    """Heads of Fast-MoCo's code: SimSiam's, but with biases and a full BatchNorm on the projector's output."""

    dim: int = 2048
    """Output of projector and predictor, channels."""
    projector_layers: int = 3
    """Linear layers of the projector."""
    projector_hidden: int | None = 2048
    """Hidden layers of the projector, channels, for every backbone. None: as wide as the backbone's features."""
    projector_bias: bool = True
    """Biases in the projector's Linear layers."""
    projector_norm: OutputNorm = "affine"
    """BatchNorm on the projector's output: none, fixed (no scale and shift), affine."""
    predictor_hidden: int = 512
    """Hidden layer of the predictor, channels."""
    predictor_bias: PredictorBias = "all"
    """Which Linear layers of the predictor have biases."""
    fix_pred_lr: bool = True
    """Keep the predictor's learning rate at its initial value, without warm-up (Fast-MoCo's code, not its paper)."""
    ema_schedule: Schedule = "constant"
    """constant, or cosine: rising to 1 over the run."""
    sum_directions: bool = False
    """2 T times the sum over the two directions (MoCo v3's code). Off: the mean over all terms (Fast-MoCo's)."""
    patches: Variant = "divide-encode-combine"
    """What predicts; see `Patches`."""


Method = mocov3.Method
