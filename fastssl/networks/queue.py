"""The queue of recent rows: keys, projections.

Legend: N rows of all processes, D features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Queue(nn.Module):
    """The last `size` rows pushed, first in first out; at the start random unit vectors (MoCo's code).

    Its state is in the checkpoint. Writing wraps around, and no index is read back from the device.
    """

    rows: Tensor
    next: Tensor

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.register_buffer("rows", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("next", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, x_ND: Tensor) -> None:
        """Replace the oldest rows, by the last ones of `x_ND` if it has more than fit. Rows are stored as they are."""
        x_ND = x_ND.detach()[-len(self.rows) :].to(self.rows.dtype)
        places = (self.next + torch.arange(len(x_ND), device=self.next.device)) % len(self.rows)
        self.rows.index_copy_(0, places, x_ND)
        self.next.add_(len(x_ND)).remainder_(len(self.rows))
