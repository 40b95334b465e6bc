"""Steps that methods of pairs of views share: encode, project, predict, and how the pairs weigh.

`PairSteps` is the plain path, on which every view predicts and is the target of the others. Add-ons replace its steps:
combinatorial patches all of them (`PatchSteps`), guided stop-gradient the weights.

Legend: B images of this process, T target views, M predictions per image, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.losses import ops
from fastssl.losses.guided import Guided, guide, guide_mean, spread
from fastssl.losses.ops import Owner, Weights
from fastssl.losses.patches import Patched, Patches, encode_patches, num_predictions, patch_views, predict, project
from fastssl.networks.encode import each_view, encode
from fastssl.networks.heads import Heads
from loaders import Batch, ViewSpec
from loaders.checks import need
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
        super().validate()
        need(
            self.guided == "off" or (self.owned and self.target_view == "other"),
            f"--guided {self.guided} chooses which view predicts: it needs predictions made from the target views "
            "(--patches off, divide-encode-combine or divide-combine-encode, no --extra-crops, --target-view other)",
        )

    def steps(self, *, siamese: bool = False, mean_targets: bool = False) -> PairSteps:
        """The steps for these options. siamese: the network under training makes the targets, too. mean_targets: the
        target of a view is the mean of the others (FastSiam)."""
        plain = self.patches == "off" and not self.extra_crops
        return PairSteps(self, mean_targets) if plain else PatchSteps(self, mean_targets, siamese)


class PairSteps:
    """The plain path: every view predicts, and is the target of the others."""

    def __init__(self, config: PairConfig, mean_targets: bool):
        self.config, self.mean_targets = config, mean_targets

    @property
    def separable(self) -> bool:
        """True if the loss is a mean over images that meet in BatchNorm only."""
        return self.config.guided == "off" and self.config.patches != "montage"

    def target_views(self, batch: Batch) -> list[Tensor]:
        """Views that targets are made from."""
        return batch.views

    def encode(self, f: nn.Module, batch: Batch) -> Any:
        """h = f(x) of what predicts; here h_TBD."""
        return encode(f, batch.views)

    def project(self, g: nn.Module, h: Any) -> Any:
        """z = g(h); here z_TBD."""
        return each_view(g, h)

    def predict(self, q: nn.Module, z: Any) -> Tensor:
        """p_MBD = q(z); here M = T."""
        return each_view(q, z)

    def targets(self, z: Any) -> Tensor:
        """sg[z_TBD] of a siamese network."""
        return z.detach()

    def owners(self, z: Any) -> list[Owner]:
        """owner_M: the target view that each prediction is made from; None: none of them."""
        return [*range(len(z))]

    def weights(self, z: Any, t_TBD: Tensor) -> Weights:
        """w of the pairs (prediction, target): all pairs of different views alike, unless an add-on says otherwise.

        Guided stop-gradient chooses by the targets' raw projections `t_TBD`.
        """
        if self.config.guided != "off":
            choose = guide_mean if self.mean_targets else guide
            return spread(choose(t_TBD, self.config), self.owners(z))
        weigh = ops.own if self.mean_targets or self.config.target_view == "same" else ops.others
        return weigh(self.owners(z), len(t_TBD))


class PatchSteps(PairSteps):
    """Tiles, crops or their combinations predict the targets of whole views (Fast-MoCo)."""

    def __init__(self, config: PairConfig, mean_targets: bool, siamese: bool):
        super().__init__(config, mean_targets)
        self.encodes_targets = siamese and config.patches != "off"

    def target_views(self, batch: Batch) -> list[Tensor]:
        return self.config.target_views(batch.views)

    def encode(self, f: nn.Module, batch: Batch) -> Patched:
        patched = encode_patches(f, batch, self.config)
        if self.encodes_targets:
            with torch.no_grad():
                patched = patched._replace(whole_TBD=encode(f, self.target_views(batch)))
        return patched

    def project(self, g: nn.Module, h: Patched) -> Patched:
        z = project(g, h, self.config)
        if h.whole_TBD is not None:
            with torch.no_grad():
                z = z._replace(whole_TBD=each_view(g, h.whole_TBD))
        return z

    def predict(self, q: nn.Module, z: Patched) -> Tensor:
        return predict(q, z, self.config)

    def targets(self, z: Patched) -> Tensor:
        """sg[z_TBD] of the whole views (Fast-MoCo section 4.4), which come first where they predict themselves."""
        return z.parts[0].x_VPBD[:, 0].detach() if z.whole_TBD is None else z.whole_TBD

    def owners(self, z: Patched) -> list[Owner]:
        return [o for part in z.parts for o in part.owner_V for _ in range(num_predictions(part, self.config))]
