"""Checkpoints that are whole or absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastssl.files import write_atomic
from loaders.errors import UserError

NAME = "checkpoint.pt"
VERSION = 1


def save(folder: Path, state: dict[str, Any]) -> None:
    """Replace the folder's checkpoint by `state`; the one before stays whole until the new one is."""
    write_atomic(folder / NAME, lambda path: torch.save(state | {"version": VERSION}, path))


def load(folder: Path) -> dict[str, Any]:
    """The folder's checkpoint, on the host. Raises UserError if there is none or it is not one."""
    path = folder / NAME
    if not path.exists():
        raise UserError(f"{folder} has no {NAME} to resume from: start it again with --overwrite")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["version"] != VERSION:
            raise UserError(f"{path} is of version {state['version']}, this program reads {VERSION}")
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} is not a checkpoint of this program ({type(error).__name__})") from error
    return state
