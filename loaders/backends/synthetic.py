"""The infinitely fast loader: random views, made once and given again and again. The yardstick for waiting on data."""

from __future__ import annotations

from loaders.backends import base
from loaders.job import Job


class Backend(base.Backend):
    """No work at all: the loader fills each slot once (`augmenter.ReadyMade`)."""

    name = "synthetic"
    ready_made = True

    def start(self, job: Job) -> base.Pending:
        self.stats.add(images=len(job.index_B))
        return base.Pending()
