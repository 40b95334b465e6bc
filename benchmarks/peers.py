"""Training steps of others, for `benchmarks.step` and `benchmarks.e2e`: peers of this project's step.

    lightly       FastSiam as the example in lightly's documentation trains it: its heads, its
                  NegativeCosineSimilarity, K views one by one through the network, the mean of the others by a mask,
                  fp32. Its loader is a DataLoader with its FastSiamTransform.
                  pip install --no-deps lightly lightly_utils && pip install lightning_utilities
    lightly-amp   the same under autocast (with loss scaling where it is fp16), as lightly's own benchmarks run it with
                  Lightning's mixed precision.
    simsiam       the loop of SimSiam's public code, written anew: two views one by one, fp32, cudnn.benchmark, and the
                  loss read back to the host at every step. Its loader is a DataLoader with torchvision's transforms.

All get this project's backbone, freshly initialised and in torch's own memory format (NCHW), heads of SimSiam's widths
(hidden layers as wide as the features, 2048 out, predictor 512), and torch.optim.SGD with momentum and weight decay.
Float32 products are torch's default: on Ampere GPUs and later TF32 in convolutions, not in matrix products. Nothing is
compiled. The learning rate is too small to change anything. SimSiam trains on two views of an image, FastSiam on K:
compare times per view.

Legend: B images, K views, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import common, contestants
from benchmarks.common import not_installed
from fastssl.device import Precision, pick_precision
from fastssl.networks.backbones import backbone
from fastssl.networks.heads import Heads, make_heads

LR, MOMENTUM, WEIGHT_DECAY = 1e-4, 0.9, 1e-4
_FP32 = pick_precision("fp32", torch.device("cpu"))

TrainStep = Callable[[Sequence[Tensor]], object]  # one step on K views [B, 3, S, S]


@dataclass(frozen=True)
class Peer:
    """A peer: `make(net, width, device)` builds its training step, `loader` (of `contestants`) feeds it."""

    make: Callable[[nn.Module, int, torch.device], TrainStep]
    loader: Callable[[common.CommonOptions, int, int], common.Batches]
    most_views: int | None = None
    """Views of an image that it can use; None: all."""
    package: str = "torch"
    install: str = ""

    def missing(self) -> str | None:
        """The reason why it cannot run here; None if it can."""
        return not_installed(self.package, self.install)

    def num_views(self, available: int) -> int:
        """Views of an image that it trains on."""
        return min(available, self.most_views or available)

    def step(self, name: str, size: int, device: torch.device) -> TrainStep:
        """Training step on backbone `name`."""
        net, width = backbone(name, size=size)
        return self.make(net, width, device)

    def batches(
        self, data: Path, num_views: int, size: int, *, batch_size: int, num: int, device: str, workers: int
    ) -> common.Batches:
        """Rounds of `num` batches of views from its own loader, from a .beton file whose bytes are in the page cache.

        `workers` are processes; 1 means that the training process loads. Restores torch's number of threads, which
        the contestants of benchmarks.loader set to 1.
        """
        options = common.CommonOptions(
            data=data, images=num * batch_size, batch_size=batch_size, size=size, device=device
        )
        threads = torch.get_num_threads()
        try:
            return self.loader(options, num_views, workers)
        finally:
            torch.set_num_threads(threads)


class Lightly:
    """lightly's FastSiam."""

    def __init__(self, net: nn.Module, width: int, device: torch.device, precision: Precision = _FP32):
        from lightly.loss import NegativeCosineSimilarity
        from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead

        heads = Heads()
        projector = SimSiamProjectionHead(width, width, heads.dim)
        predictor = SimSiamPredictionHead(heads.dim, heads.predictor_hidden, heads.dim)
        self.net = nn.ModuleList([net, projector, predictor]).to(device).train()
        self.criterion = NegativeCosineSimilarity()
        self.optimizer = _sgd(self.net)
        self.device, self.precision = device, precision
        torch.backends.cudnn.benchmark = True  # as for ours
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision.scale)

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        net, projector, predictor = self.net
        z = projector(net(x).flatten(start_dim=1))
        return z.detach(), predictor(z)

    def __call__(self, views: Sequence[Tensor]) -> Tensor:
        with self.precision.autocast(self.device):
            z, p = zip(*map(self._encode, views), strict=True)
            z_KBD, loss = torch.stack(z), torch.zeros((), device=self.device)
            for i, p_BD in enumerate(p):
                others = torch.arange(len(views), device=self.device) != i
                loss = loss + self.criterion(p_BD, z_KBD[others].mean(0)) / len(views)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss.detach()


def lightly_amp(net: nn.Module, width: int, device: torch.device) -> Lightly:
    """lightly's FastSiam in mixed precision."""
    return Lightly(net, width, device, pick_precision("auto", device))


class SimSiam:
    """SimSiam as its public code trains it."""

    def __init__(self, net: nn.Module, width: int, device: torch.device):
        self.net, self.precision = nn.ModuleList([net, *make_heads(width, Heads())]).to(device).train(), _FP32
        self.optimizer = _sgd(self.net)

    def __call__(self, views: Sequence[Tensor]) -> float:
        encoder, projector, predictor = self.net
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            z1, z2 = (projector(encoder(x)) for x in views)
            p1, p2 = predictor(z1), predictor(z2)
            loss = -(F.cosine_similarity(p1, z2.detach()).mean() + F.cosine_similarity(p2, z1.detach()).mean()) / 2
            shown = loss.item()  # its progress meter reads every loss
            self.optimizer.zero_grad()
            loss.backward()
        self.optimizer.step()
        return shown


def _sgd(net: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


_LIGHTLY = {
    "loader": contestants.lightly,
    "package": "lightly",
    "install": "pip install --no-deps lightly lightly_utils && pip install lightning_utilities",
}
PEERS = {
    "lightly": Peer(Lightly, **_LIGHTLY),
    "lightly-amp": Peer(lightly_amp, **_LIGHTLY),
    "simsiam": Peer(SimSiam, contestants.pil, most_views=2),
}
