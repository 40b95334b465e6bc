"""Base class of evaluations, and the task that they are given: a backbone and two labelled files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastssl import export
from fastssl.device import Precision
from fastssl.evaluate.features import extract
from fastssl.networks.backbones import backbone, check_size
from loaders.beton import Reader
from loaders.checks import Options
from loaders.dataset import Readers
from loaders.errors import UserError

Results = dict[str, dict[str, float]]
"""Metrics by name, for every setting of an evaluation: {"weighted k=20": {"top1": 51.3}}."""


@dataclass
class Task:
    """One backbone on labelled data."""

    backbone: nn.Module
    train: Reader | Readers
    val: Reader | Readers
    size: int  # px
    device: torch.device
    precision: Precision
    workers: int | None = None

    def features(self, reader: Reader | Readers) -> tuple[Tensor, Tensor]:
        """L2-normalised features [N, D] and labels [N] of a file."""
        return extract(
            self.backbone,
            reader,
            size=self.size,
            device=self.device,
            amp_dtype=self.precision.dtype,
            workers=self.workers,
        )


@dataclass(kw_only=True)
class Evaluation(Options):
    """An evaluation of frozen backbones. A subclass is a dataclass: its fields are flags of `fastssl-eval NAME`, where
    NAME is its file, and the docstring of that file is the help. Libraries that only it needs are imported in `run`.
    """

    def check(self, task: Task) -> None:
        """Raise UserError if the options do not go with the task's data."""

    def run(self, task: Task) -> Results:
        """Evaluate the backbone."""
        raise NotImplementedError(f"{type(self).__module__} defines no run(task)")


def load_backbone(path: Path, name: str | None, size: int | None, seed: int) -> tuple[nn.Module, nn.Module, int]:
    """The backbone with the weights at `path`, the same network at random initialisation, and the views' size in px.

    `path` is a run folder or a .safetensors file. Files that fastssl-train wrote know their backbone and size; for
    others both must be given. Networks whose weights depend on the size of the training images (ViTs) are built for
    that size and run at `size`. Raises UserError if something is missing or does not fit.
    """
    file = path / export.NAME if path.is_dir() else path
    if path.is_dir() and not file.exists():
        raise UserError(
            f"{path} holds no {export.NAME}: the run has not ended (continue it with fastssl-train --resume)"
        )
    state, about = export.load_weights(file)
    name = name or about.get("backbone")
    trained = int(about["size"]) if "size" in about else size
    size = size or trained
    if name is None or size is None or trained is None:
        raise UserError(f"{file} does not say what it is: give --backbone NAME and --size PX")
    model = json.loads(about["config"])["model"] if "config" in about else {}
    torch.manual_seed(seed)
    random_net, _ = backbone(name, size=trained, zero_init_residual=model.get("zero_init_residual", True))
    check_size(name, random_net, size)
    net, _ = backbone(name, size=trained)
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file} does not fit a {name}: {reason}") from error
    return net, random_net, size
