"""Backends turn JPEG bytes and boxes into uint8 crops: one file each, found by module name. `base`: their contract."""

from __future__ import annotations

import importlib
import pkgutil

import torch

from loaders.backends.base import Backend, Pending
from loaders.errors import UserError, unknown

__all__ = ["Backend", "Pending", "available", "find", "load"]


def available() -> list[str]:
    """Names of the backends in this folder, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "base")


def find(name: str) -> type[Backend]:
    """The Backend class of `name`, be it able to run here or not. Raises UserError for an unknown name."""
    if name not in available():
        raise unknown("backend", name, ["auto", *available()])
    return importlib.import_module(f"{__name__}.{name}").Backend


def load(name: str, device: torch.device) -> type[Backend]:
    """The Backend class of `name`. Raises UserError for an unknown name and for one that cannot run here."""
    backend = find(name)
    if missing := backend.missing(device):
        raise UserError(f"--backend {name} cannot run here: {missing}")
    return backend
