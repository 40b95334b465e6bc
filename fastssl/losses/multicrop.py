"""Re-balanced multi-crop: small views beside the large ones, and how their pairs weigh.

Legend: K views, T of them targets.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastssl.conditions import above
from loaders import ViewSpec
from loaders.checks import Options, at_least, share
from loaders.views import Recipe, with_local


@dataclass(kw_only=True)
class MultiCrop(Options):
    """Small views beside the two large ones (SwAV section 3.3), and how their pairs weigh (SSLight: Tan, Saleh and
    Martinez, "Effective Self-supervised Pre-training on Low-compute Networks without Distillation", ICLR 2023)."""

    num_local: int = 0
    """L: small views per image."""
    local_size: int = 96
    """Side of the small views, px."""
    local_scale: tuple[float, float] = (0.05, 0.14)
    """Share of the image's area that small views show, from and to."""
    alpha: float | None = None
    """Weight of the global-global pairs against 1 - alpha for the global-local ones (SSLight: 0.4). None: all pairs
    count the same, which is 1/(1+L)."""

    READ_IF = dict.fromkeys(("local_size", "local_scale", "alpha"), above("num_local", 0))

    def views(self, recipe: Recipe) -> ViewSpec:
        """Two large views, and L small ones."""
        return with_local(recipe(2), self.num_local, self.local_size, self.local_scale)

    def validate(self) -> None:
        """Raise UserError for values that make no sense."""
        super().validate()
        at_least(self, 0, "num_local")
        share(self, "alpha")


def rebalanced_weights(num_views: int, num_targets: int, alpha: float | None) -> list[list[float]]:
    """[K][T] weights, sum 1, of pairs of different views: alpha for the mean of the pairs of large views, 1 - alpha for
    the mean of the others (SSLight). The first two views are large, the first `num_targets` of them targets."""
    large = [(i, j) for j in range(num_targets) for i in range(2) if i != j]
    small = [(i, j) for j in range(num_targets) for i in range(2, num_views)]
    if alpha is None or not small:
        alpha = len(large) / (len(large) + len(small))
    w = [[0.0] * num_targets for _ in range(num_views)]
    for pairs, total in ((large, alpha), (small, 1 - alpha)):
        for i, j in pairs:
            w[i][j] = total / len(pairs)
    return w
