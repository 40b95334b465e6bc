"""The monitor of a run: weighted kNN of the validation images among training images, now and then."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from fastssl.config.schema import RunConfig
from fastssl.evaluate import knn
from fastssl.evaluate.features import extract
from fastssl.evaluate.recalibrate import recalibrated
from loaders.beton import Reader
from loaders.dataset import Readers


class Monitor:
    """Says how good a backbone is, and remembers the best and the last answer (top-1, %). Without validation images it
    only recalibrates."""

    def __init__(
        self,
        config: RunConfig,
        reader: Reader | Readers,
        val_reader: Reader | Readers | None,
        device: torch.device,
        amp_dtype: torch.dtype | None,
    ):
        self.run, self.reader, self.val_reader = config.run, reader, val_reader
        self.crops = {"size": config.data.size, "device": device, "amp_dtype": amp_dtype}
        self.settings = knn.Knn(k=(self.run.knn_k,), temperature=self.run.knn_temperature, vote="weighted")
        self.best: float | None = None
        self.last: float | None = None

    def __call__(self, backbone: nn.Module) -> tuple[dict[str, Any], str]:
        """What to log about the backbone, and how to say it."""
        started = time.perf_counter()
        result = self._accuracy(backbone)
        self.last = result["top1"]
        self.best = max(self.last, self.best or 0.0)
        entry = {"knn": result["top1"], "knn_top5": result["top5"]}
        line = f"kNN top-1 {result['top1']:.1f} %, top-5 {result['top5']:.1f} %"
        if self.run.recalibrate_bn:
            result = self._accuracy(self.recalibrated(backbone))
            entry |= {"knn_recalibrated": result["top1"], "knn_recalibrated_top5": result["top5"]}
            line += f"; BatchNorm recalibrated: {result['top1']:.1f} %, {result['top5']:.1f} %"
        return entry | {"knn_seconds": time.perf_counter() - started}, line

    def _accuracy(self, backbone: nn.Module) -> dict[str, float]:
        bank = extract(backbone, self.reader, limit=self.run.knn_bank, **self.crops)
        (result,) = knn.accuracy(bank, extract(backbone, self.val_reader, **self.crops), self.settings).values()
        return result

    def recalibrated(self, backbone: nn.Module) -> nn.Module:
        """The backbone with BatchNorm statistics for evaluation."""
        return recalibrated(backbone, self.reader, images=self.run.recalibrate_bn, **self.crops)
