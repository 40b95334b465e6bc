"""What a backend is: JPEG bytes and boxes in, uint8 crops out, each image decoded once however many views it has."""

from __future__ import annotations

from typing import ClassVar

import torch

from loaders.dataset import Dataset
from loaders.job import Job
from loaders.machine import default_workers
from loaders.stats import Stats
from loaders.views import ViewSpec


class Pending:
    """Work under way for one batch; this base is work that is done already, or that a device does in stream order."""

    def done(self) -> bool:
        """Say if `wait` would return at once."""
        return True

    def wait(self) -> None:
        """Block until the crops of the job are whole. Raises what the work raised."""


class Failed(Pending):
    """Work that could not begin: it raises when its turn comes, after the batches before it."""

    def __init__(self, error: Exception):
        self.error = error

    def wait(self) -> None:
        raise self.error


class Backend:
    """Base of the `Backend` class in each file of this folder.

    One thread calls `start` for a batch after another and waits for them in the same order; a few may be under way.
    """

    name: ClassVar[str]
    """The name of the module."""
    owns_crops: ClassVar[bool] = False
    """The crops lie in the backend's own memory: `wait` puts K tensors in `job.crops`, which stay valid for as long as
    somebody holds them. Else the backend writes into the tensors that it finds there."""
    augments: ClassVar[bool] = False
    """The backend calls `job.augment_rows` where it has made the crops."""
    in_memory: ClassVar[bool] = False
    """The backend does not read the file while it works."""
    ready_made: ClassVar[bool] = False
    """There is nothing to draw and nothing to augment: synthetic views."""

    device: torch.device
    """Where the crops appear."""

    @classmethod
    def missing(cls, device: torch.device) -> str | None:
        """The reason why this backend cannot run here, with the remedy; None if it can."""
        del device
        return None

    def __init__(
        self,
        reader: Dataset,
        spec: ViewSpec,
        *,
        batch_size: int,
        device: torch.device,
        workers: int | None = None,
        stats: Stats,
    ):
        self.reader, self.spec, self.batch_size, self.device, self.stats = reader, spec, batch_size, device, stats
        self.workers = workers or default_workers(device)
        self.setup()

    def setup(self) -> None:
        """Start what the work needs: threads, memory. Raises UserError where that is not to be had."""

    def start(self, job: Job) -> Pending:
        """Begin the work for one batch and return at once."""
        raise NotImplementedError

    def decoded_bytes(self) -> int:
        """Memory that decoded images take for as long as the backend is open."""
        return 0

    def close(self) -> None:
        """End the threads and give the memory back."""
