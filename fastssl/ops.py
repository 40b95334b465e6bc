"""Pure functions that the methods are written with.

Every method is L = mean_b sum_ij w_ijb d(p_ib, sg[t_jb]) (DESIGN section 2): predictions p, targets t without
gradient, a distance d and pair weights w.

`divide` (images to tiles) is the loader's own, which can do it ahead of training.

Legend: B images, K views, D features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from loaders.augment import divide

__all__ = ["divide", "feature_std", "mean_of_others", "negative_cosine"]


def negative_cosine(p: Tensor, t: Tensor) -> Tensor:
    """D(p, t) = -cos(p, t) over the last axis, in fp32 (SimSiam eq. 1). The caller detaches t."""
    # Half precision has three digits near 1, where these values live: the reduction is done in fp32 under autocast too.
    with torch.autocast(p.device.type, enabled=False):
        return -F.cosine_similarity(p.float(), t.float(), dim=-1, eps=1e-8)


def mean_of_others(z_KBD: Tensor) -> Tensor:
    """For every view the mean of the K - 1 other views' outputs: (sum - self) / (K - 1), one pass (FastSiam eq. 4).

    Raw outputs are averaged; normalising first would be another estimator (it weighs views by 1/|z|).
    Returns [K, B, D]. Raises ValueError for K < 2.
    """
    num_views = z_KBD.shape[0]
    if num_views < 2:
        raise ValueError(f"the mean of the other views needs at least 2 views, got {num_views}")
    if num_views == 2:
        return z_KBD.flip(0)  # exact: (a + b) - a is not always b in floating point
    return (z_KBD.sum(0, keepdim=True) - z_KBD) / (num_views - 1)


@torch.no_grad()
def feature_std(z: Tensor) -> Tensor:
    """Mean over channels of the batch std of L2-normalised outputs: 1/sqrt(D) is healthy, 0 is collapsed.

    (SimSiam section 4.1.) z [..., B, D]; leading axes (views) are averaged.
    """
    return F.normalize(z.float(), dim=-1).std(dim=-2).mean()
