"""Known graphics cards, and how long one image takes on them: derived from their data sheets, not measured.

    seconds = max(max(bytes / bandwidth, flops / rate) / EFFICIENCY, operations * LAUNCH)

`cost.step_cost` gives bytes, flops and operations, every operation by itself. EFFICIENCY is the share of the first
bound that published trainings of ResNet-50 reach (224 px, mixed precision, channels last, nothing fused by a
compiler). One number serves three generations of cards: derived rates are within 6 % of those published ones, and
within 16 % for ResNet-34, MobileNetV2 and ResNet-18 on the RTX 3090, which had no part in the number. LAUNCH is
assumed. For transformers, and for images too small to fill a large card, the figures are optimistic. No training rate
in mixed precision and channels last is published for the RTX 2080 Ti. Lambda found it at 0.55 of a V100 in fp16 over
several networks (TensorFlow 1.12, 2019), where the data sheets say 0.68: its EFFICIENCY is taken to be lower by that
ratio.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastssl.planning.cost import StepCost

GB, TERA = 1e9, 1e12
GIB = 2**30
LAUNCH = 6e-6  # seconds from one operation to the next where they are short: an assumption


@dataclass(frozen=True)
class Card:
    """A card, by its maker's data sheet."""

    name: str
    bandwidth: float
    """Bandwidth of its memory, bytes/s."""
    rate: float
    """Dense products in fp16 and bf16 on tensor cores with sums in fp32, operations/s, at boost clock."""
    memory: float
    """Memory, bytes."""
    source: str
    reach: float = 1.0
    """A factor for EFFICIENCY, 1 unless a publication gives reason for another."""


_TURING = "NVIDIA Turing GPU Architecture, WP-09183-001, appendix A (reference clocks)"
_GA102 = "NVIDIA Ampere GA102 GPU Architecture, V2.1, appendix A"
_ADA = "NVIDIA Ada GPU Architecture, V2, appendix A"
_VOLTA = "NVIDIA V100 data sheet, January 2020 (SXM2)"
_A100 = "NVIDIA A100 data sheet, June 2021 (SXM4)"
_H100 = "NVIDIA H100 data sheet (SXM5; half of the rate with sparsity)"
_H200 = "NVIDIA H200 data sheet (SXM5; half of the rate with sparsity)"

CARDS = (
    Card("RTX 2080 Ti", 616 * GB, 53.8 * TERA, 11 * GIB, _TURING, reach=0.55 / (616 / 900)),
    Card("RTX 3090", 936 * GB, 71 * TERA, 24 * GIB, _GA102),
    Card("RTX 4090", 1008 * GB, 165.2 * TERA, 24 * GIB, _ADA),
    Card("A100 40 GB", 1555 * GB, 312 * TERA, 40 * GIB, "NVIDIA A100 Tensor Core GPU Architecture, V1.0, table 1"),
    Card("A100 80 GB", 2039 * GB, 312 * TERA, 80 * GIB, _A100),
    Card("H100", 3350 * GB, 989.5 * TERA, 80 * GIB, _H100),
    Card("H200", 4800 * GB, 989.5 * TERA, 141 * GB, _H200),
)
_V100 = Card("V100", 900 * GB, 125 * TERA, 32 * GIB, _VOLTA)


@dataclass(frozen=True)
class Published:
    """A training rate of ResNet-50."""

    card: Card
    images_per_s: float
    source: str


def card(name: str) -> Card:
    """The card called `name`."""
    return next(c for c in CARDS if c.name == name)


_DALI = "NVIDIA DeepLearningExamples, PyTorch ResNet-50 v1.5, AMP, NHWC, DALI, 21.03"
PUBLISHED = (
    Published(card("RTX 3090"), 1218, "timm results, benchmark-train-amp-nhwc-pt112-cu113-rtx3090"),
    Published(card("A100 80 GB"), 2470, _DALI),
    Published(_V100, 1200, _DALI),
)
# One image of 224 px in a supervised step at batch 64 with SGD (test_cards.py counts it again).
RESNET50 = StepCost(flops=24.30e9, bytes=0.4725e9, peak=3.09e9, operations=8.469)


def roofline(card: Card, cost: StepCost) -> tuple[float, str]:
    """Fewest seconds that an image's computations can take on the card, and which of its parts limits them."""
    memory, compute = cost.bytes / card.bandwidth, cost.flops / card.rate
    return (memory, "bandwidth") if memory >= compute else (compute, "tensor cores")


EFFICIENCY = math.prod(p.images_per_s * roofline(p.card, RESNET50)[0] for p in PUBLISHED) ** (1 / len(PUBLISHED))


def seconds_per_image(card: Card, cost: StepCost) -> tuple[float, str]:
    """Seconds of an image in training on the card, derived, and what limits the speed."""
    computing, limit = roofline(card, cost)
    launching = cost.operations * LAUNCH
    return max((computing / EFFICIENCY / card.reach, limit), (launching, "launches"))
