"""Backends turn JPEG bytes and boxes into uint8 crops: one file each, found by module name.

A backend module defines `class Backend` with

    name          the module's name
    device        torch.device on which the crops appear
    missing(device) -> str | None       class method: why it cannot run here and how to mend that
    __init__(reader, spec, *, batch_size, device, workers, stats)
    start(job) -> Pending
    close()

`start` begins the work for one batch and returns at once; a few batches may be under way, waited for in their order.
`Pending.wait()` blocks until the crops of `job` are whole, and raises what went wrong. Each image is decoded once
however many views are cut from it. Class attributes, False unless set, say how it works with the loader:

    owns_crops    the crops lie in the backend's own memory: `wait` puts K tensors in `job.crops`, which stay as they
                  are for as long as somebody holds them
    augments      it calls `job.augment_rows` where the crops were made
    in_memory     it does not read the file while it works
    ready_made    there is nothing to draw or to augment (synthetic data)
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any, ClassVar, Protocol

import torch

from loaders.errors import UserError, unknown
from loaders.job import Job


class Pending(Protocol):
    """Work under way for one batch."""

    def done(self) -> bool:
        """Whether `wait` would return at once."""

    def wait(self) -> None:
        """Block until the batch is whole. Raises what the work raised."""


class Backend(Protocol):
    """What the loader relies on; backends need not inherit it."""

    name: ClassVar[str]
    device: torch.device

    @classmethod
    def missing(cls, device: torch.device) -> str | None: ...

    def start(self, job: Job) -> Pending: ...

    def close(self) -> None: ...


def available() -> list[str]:
    """Names of the backends in this folder, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def load(name: str, device: torch.device) -> Any:
    """The Backend class of `name`. Raises UserError for an unknown name and for one that cannot run here."""
    if name not in available():
        raise unknown("backend", name, ["auto", *available()])
    backend = importlib.import_module(f"{__name__}.{name}").Backend
    missing = backend.missing(device)
    if missing:
        raise UserError(f"--backend {name} cannot run here: {missing}")
    return backend
