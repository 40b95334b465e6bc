"""Guided stop-gradient: weights that choose, for each image, which view predicts and which is the target.

Legend: B images of this process, K views, T of them targets, M predictions, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastssl.conditions import other_than
from fastssl.device import at_least_fp32
from fastssl.losses.ops import Owner
from loaders.checks import Options

# ------------------------------------------------------------------ guided stop-gradient


@dataclass(kw_only=True)
class Guided(Options):
    """Options of guided stop-gradient (Lee and Lee, "Implicit Contrastive Representation Learning with Guided
    Stop-gradient", NeurIPS 2023)."""

    guided: Literal["off", "guided", "random", "reversed"] = "off"
    """Per image, which view predicts and which is the target: both do both (off), the view closest to one of another
    image's views predicts (guided), a random one does (random), the other one does (reversed)."""
    guided_views: Literal[2, 4] = 4
    """Views per image: 4, two of them paired with two of the other image, as the official code has it; or 2, which
    serve in both pairs and cost half as much."""
    fixed_points: bool = True
    """Let an image be its own partner at times (a random permutation, as in the official code), or never."""

    READ_IF = dict.fromkeys(("guided_views", "fixed_points"), other_than("guided", "off"))

    @property
    def num_guided_views(self) -> int:
        """Views that a method of pairs needs: 2, or 4 for the faithful form."""
        return 2 if self.guided == "off" else self.guided_views


def draw_partners(num: int, fixed_points: bool, device: torch.device) -> Tensor:
    """partner_B: a random permutation, or a random cycle through all images, which leaves none in its place."""
    order = torch.randperm(num, device=device)
    if fixed_points:
        return order
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)
    return partner


@torch.no_grad()
def closest_views(z_KBD: Tensor, other_KBD: Tensor, mode: str = "guided") -> tuple[Tensor, Tensor]:
    """(a_B, b_B): which view of each image, and which of its partner's, gets the predictor.

    "guided": the closest pair, by the Euclidean distance of raw outputs, the first one of equals; "reversed": the pair
    at the mirrored place (index 3 - k of K = 2); "random": any.
    """
    K, B, _ = z_KBD.shape
    if mode == "random":
        pick_B = torch.randint(K * K, (B,), device=z_KBD.device)
    else:
        z_KBD, other_KBD = at_least_fp32(z_KBD), at_least_fp32(other_KBD)
        d_KKB = torch.stack([torch.linalg.vector_norm(z - other_KBD, dim=-1) for z in z_KBD])
        d_B, places = d_KKB.flatten(0, 1), torch.arange(K * K, device=z_KBD.device)[:, None]
        # argmin may name any of several equal places.
        pick_B = torch.where(d_B == d_B.amin(0), places, K * K - 1).amin(0)
        pick_B = K * K - 1 - pick_B if mode == "reversed" else pick_B
    return pick_B // K, pick_B % K


def guided_weights(z_2BD: Tensor, partner_B: Tensor, mode: str = "guided") -> Tensor:
    """w_22B: w[i, j, b] weighs d(p_i, t_j) of image b and sums to 1 per image; the partners' views are their own two.

    The view closest to one of the partner's predicts, the other one is the target.
    """
    a_B, _ = closest_views(z_2BD, z_2BD[:, partner_B], mode)
    return _one_direction(a_B)


def guided_weights_4(z_4BD: Tensor, partner_B: Tensor, mode: str = "guided") -> Tensor:
    """w_44B of the official form, with sum 1 per image: views 0 and 1 are paired with views 2 and 3 of the partner.

    Row b of the loss is 1/2 D(p_1a, z_1a') + 1/2 D(p_2b, z_2b') with images 1 = b and 2 = partner(b).
    """
    a_B, c_B = closest_views(z_4BD[:2], z_4BD[2:, partner_B], mode)
    b_B = torch.empty_like(c_B)
    b_B[partner_B] = c_B
    w_44B = z_4BD.new_zeros((4, 4, len(a_B)), dtype=torch.float32)
    w_44B[:2, :2] = _one_direction(a_B) / 2
    w_44B[2:, 2:] = _one_direction(b_B) / 2
    return w_44B


def _one_direction(a_B: Tensor) -> Tensor:
    """[2, 2, B]: 1 where view a predicts the other one."""
    first = (a_B == 0).float()
    zero = torch.zeros_like(first)
    return torch.stack([torch.stack([zero, first]), torch.stack([1 - first, zero])])


def guide(z_KBD: Tensor, options: Guided) -> Tensor:
    """w_KKB for newly drawn partners, from the targets' raw outputs; K = 2 or 4."""
    partner_B = draw_partners(z_KBD.shape[1], options.fixed_points, z_KBD.device)
    weigh = {2: guided_weights, 4: guided_weights_4}[len(z_KBD)]
    return weigh(z_KBD, partner_B, options.guided)


def guide_mean(z_KBD: Tensor, options: Guided) -> Tensor:
    """w_KKB where the target of view i is the mean of the others: w[a, a, b] = 1 for the view a_b closest to any of the
    partner's K views; reversed, all views but a_b share the weight. Of fastssl, not of a paper; for K = 2 it is
    `guided_weights`."""
    partner_B = draw_partners(z_KBD.shape[1], options.fixed_points, z_KBD.device)
    K, turned = len(z_KBD), options.guided == "reversed"
    a_B, _ = closest_views(z_KBD, z_KBD[:, partner_B], "guided" if turned else options.guided)
    chosen_KB = (torch.arange(K, device=a_B.device)[:, None] == a_B).float()
    if turned:
        chosen_KB = (1 - chosen_KB) / (K - 1)
    return torch.diag_embed(chosen_KB.T).permute(1, 2, 0)


def spread(w_KTB: Tensor, owner_M: Sequence[Owner]) -> Tensor:
    """w_MTB: the weights of views, shared equally by the predictions that were made from each."""
    share = [1 / owner_M.count(o) for o in owner_M]
    return torch.stack([w_KTB[o] * s for o, s in zip(owner_M, share, strict=True)])


# ------------------------------------------------------------------ re-balanced multi-crop
