"""The monitor of a run: weighted kNN of the validation images among training images, now and then."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor, nn

from fastssl.evaluate import knn
from fastssl.evaluate.features import extract
from fastssl.evaluate.recalibrate import recalibrated
from fastssl.training.build import Setup
from loaders.dataset import Dataset


class Monitor:
    """A measure of the backbone, kNN top-1 in %, with its best and its last value."""

    def __init__(self, setup: Setup):
        self.setup, self.run = setup, setup.config.run
        self.settings = knn.Knn(k=(self.run.knn_k,), temperature=self.run.knn_temperature, vote="weighted")
        self.best: float | None = None
        self.last: float | None = None

    def __call__(self) -> tuple[dict[str, Any], str]:
        """Evaluate the backbone. Returns what to log, and a line for people."""
        started = time.perf_counter()
        result = self._accuracy(self.setup.method.backbone)
        self.last = result["top1"]
        self.best = max(self.last, self.best or 0.0)
        entry = {"knn": result["top1"], "knn_top5": result["top5"]}
        line = f"kNN top-1 {result['top1']:.1f} %, top-5 {result['top5']:.1f} %"
        if self.run.recalibrate_bn:
            result = self._accuracy(self.recalibrated())
            entry |= {"knn_recalibrated": result["top1"], "knn_recalibrated_top5": result["top5"]}
            line += f"; BatchNorm recalibrated: {result['top1']:.1f} %, {result['top5']:.1f} %"
        return entry | {"knn_seconds": time.perf_counter() - started}, line

    def _accuracy(self, backbone: nn.Module) -> dict[str, float]:
        assert self.setup.val_reader is not None  # without --val there is nothing to ask
        bank = self.features(backbone, self.setup.reader, self.run.knn_bank)
        (result,) = knn.accuracy(bank, self.features(backbone, self.setup.val_reader), self.settings).values()
        return result

    def features(self, backbone: nn.Module, reader: Dataset, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """Features and labels of a file's images, of at most `limit` of them."""
        size, device, dtype = self.setup.config.data.size, self.setup.device, self.setup.precision.dtype
        return extract(backbone, reader, size=size, device=device, amp_dtype=dtype, limit=limit)

    def recalibrated(self) -> nn.Module:
        """A copy of the backbone with BatchNorm statistics for evaluation."""
        size, device, dtype = self.setup.config.data.size, self.setup.device, self.setup.precision.dtype
        images = self.run.recalibrate_bn
        backbone, reader = self.setup.method.backbone, self.setup.reader
        return recalibrated(backbone, reader, size=size, device=device, images=images, amp_dtype=dtype)
