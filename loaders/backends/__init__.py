"""Backends turn JPEG bytes and boxes into uint8 crops: one file each, found by module name.

A backend module defines `class Backend` with

    name      the module's name
    device    torch.device on which the crops appear
    __init__(reader, spec, *, batch_size, device, workers, stats)
    start(job) -> Pending
    close()

`start` begins the work for one batch and returns at once; `Pending.wait()` blocks until `job.crops` (and, on a CPU,
`job.views`) are whole, and raises what went wrong. Each image is decoded once however many views are cut from it.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Protocol

from loaders.errors import unknown


class Pending(Protocol):
    """Work under way for one batch."""

    def done(self) -> bool:
        """Whether `wait` would return at once."""

    def wait(self) -> None:
        """Block until the batch is whole. Raises what the work raised."""


def available() -> list[str]:
    """Names of the backends in this folder, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def load(name: str) -> type:
    """The Backend class of `name`; `auto` takes the one that fits best. Raises UserError for an unknown name."""
    if name == "auto":
        name = "cpu"
    if name not in available():
        raise unknown("backend", name, ["auto", *available()])
    return importlib.import_module(f"{__name__}.{name}").Backend
