"""The infinitely fast loader: random pixels made once, handed out for ever. The yardstick for waiting on data."""

from __future__ import annotations

import torch

from loaders.beton import Reader
from loaders.job import Job
from loaders.stats import Stats
from loaders.views import ViewSpec


class Ready:
    """Work that was done long ago."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        pass


class Backend:
    """See the package's docstring for the protocol."""

    name = "synthetic"
    ready_made = True  # the loader fills each slot once and neither draws nor augments

    @classmethod
    def missing(cls, device: torch.device) -> str | None:
        del device
        return None

    def __init__(
        self,
        reader: Reader,
        spec: ViewSpec,
        *,
        batch_size: int,
        device: torch.device,
        workers: int | None = None,
        stats: Stats,
    ):
        del reader, spec, batch_size, workers
        self.device, self.stats = device, stats

    def start(self, job: Job) -> Ready:
        self.stats.add(images=len(job.index_B))
        return Ready()

    def close(self) -> None:
        pass
