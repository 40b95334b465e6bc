"""The backbone's weights in a file that other programs load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn

from fastssl.files import write_atomic
from loaders.errors import UserError

NAME = "weights.safetensors"


def save_weights(path: Path, backbone: nn.Module, about: dict[str, Any]) -> None:
    """Write the backbone's state dict (torchvision's or timm's names, no fc) with `about` as metadata, atomically."""
    state = {k: v.detach().cpu().contiguous() for k, v in backbone.state_dict().items()}
    metadata = {k: v if isinstance(v, str) else json.dumps(v) for k, v in about.items()}

    def write(temporary: Path) -> None:  # not safetensors' save_file, which makes files that only their owner can read
        temporary.write_bytes(save(state, metadata))

    write_atomic(path, write)


def load_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """State dict and metadata of a weights file. Raises UserError if it is missing or not one."""
    if not path.is_file():
        raise UserError(f"no weights at {path}: give a run folder or a {NAME} file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), metadata
    except Exception as error:
        raise UserError(f"{path} is not a safetensors file ({error})") from error
