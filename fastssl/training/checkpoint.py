"""Checkpoints: everything that the next step depends on, in a file that is whole or absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastssl.config import schema as configs
from fastssl.files import write_atomic
from fastssl.training.build import Setup
from loaders.errors import UserError

NAME = "checkpoint.pt"
VERSION = 2  # 2: fastssl 0.2, whose ViTs and options of heads differ from 0.1's


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
            raise UserError(
                f"{path} is of version {state['version']}, this program continues {VERSION}: finish the run with the "
                "fastssl that began it, or start it again with --overwrite"
            )
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} is not a checkpoint of this program ({type(error).__name__})") from error
    return state


def state_of(setup: Setup) -> dict[str, Any]:
    """Configuration, weights, optimiser and random generators of a run, as they are now."""
    return {
        "config": configs.to_dict(setup.config),
        "backend": setup.loader.backend.name,
        "steps_per_epoch": setup.steps_per_epoch,
        "num_samples": len(setup.reader),
        **setup.step.state_dict(),
        "threads": torch.get_num_threads(),
        "rng": torch.get_rng_state(),
        "rng_cuda": torch.cuda.get_rng_state(setup.device) if setup.on_gpu else None,
    }


def restore(setup: Setup, state: dict[str, Any], folder: Path) -> None:
    """Bring a run to the state that `load` read from `folder`. Raises UserError for other data."""
    if (state["num_samples"], state["steps_per_epoch"]) != (len(setup.reader), setup.steps_per_epoch):
        raise UserError(
            f"{setup.config.data.data} holds {len(setup.reader)} images, the run in {folder} began with "
            f"{state['num_samples']}: resume with the same data"
        )
    setup.step.load_state_dict(state)
    torch.set_rng_state(state["rng"])
    if not setup.on_gpu:
        # Sums are split among the threads: another number of threads would change the losses' last bits.
        torch.set_num_threads(state["threads"])
    elif state["rng_cuda"] is not None:
        torch.cuda.set_rng_state(state["rng_cuda"], setup.device)
