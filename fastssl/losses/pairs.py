"""What methods of pairs of views share: their options, and the weights that add-ons give the pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fastssl.losses import ops
from fastssl.losses.guided import Guided, guide, spread
from fastssl.losses.ops import Owner, Weights
from fastssl.losses.patches import Patches, patch_views
from fastssl.networks.heads import Heads
from loaders import ViewSpec
from loaders.errors import UserError
from loaders.views import Recipe


@dataclass(kw_only=True)
class PairConfig(Heads, Patches, Guided):
    """Heads, combinatorial patches and guided stop-gradient."""

    @property
    def num_target_views(self) -> int:
        """Views per image that make targets."""
        return self.num_guided_views

    def views(self, recipe: Recipe) -> ViewSpec:
        """Two views, four for the official form of guided stop-gradient, and what the patches need."""
        return patch_views(recipe(self.num_target_views), self)

    def validate(self) -> None:
        """Raise UserError for values that make no sense."""
        self.validate_heads()
        self.validate_patches(self.num_target_views)
        if self.guided != "off" and not (self.owned and self.target_view == "other"):
            raise UserError(
                f"--guided {self.guided} chooses which view predicts: it needs predictions made from the target views "
                "(--patches off, divide-encode-combine or divide-combine-encode, no --extra-crops, --target-view other)"
            )


def pair_weights(owner_M: Sequence[Owner], z_TBD: Tensor, config: PairConfig) -> Weights:
    """w of the pairs (prediction, target): all pairs of different views alike, unless an add-on says otherwise.

    `owner_M` says which view each prediction was made from; `z_TBD` are the targets' raw projections, by which guided
    stop-gradient chooses.
    """
    if config.guided != "off":
        return spread(guide(z_TBD, config), owner_M)
    same = config.target_view == "same"
    return (ops.own if same else ops.others)(owner_M, len(z_TBD))
