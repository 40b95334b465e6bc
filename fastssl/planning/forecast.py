"""The forecast of a run: everything that is measured of it, and the hours that follow."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fastssl.config import schema as configs
from fastssl.config.schema import RunConfig
from fastssl.planning.bench import Neighbours, RunBench
from fastssl.planning.cost import step_cost
from fastssl.planning.schedule import Range, Timings, at_size, parts, total
from fastssl.training import memory


class Forecast:
    """A run, measured for some seconds in `folder`, which is empty and not the run's."""

    def __init__(self, config: RunConfig, folder: Path):
        self.config, self.folder = config, folder
        with RunBench(config, folder / "run") as bench:
            self.bench, self.setup = bench, bench.setup
            self.step = bench.step_alone()
            self.loader, self.stages = bench.loader_alone()
            neighbours = Neighbours()
            loop, self.report = bench.loop(ahead=self._ahead)
            self.neighbours = neighbours.cores()
            self.memory = memory.peak_memory(bench.setup.device)
            saving, files, self.checkpoint_bytes, self.weights_bytes = bench.write()
            size = config.data.size
            self.timings = Timings({size: loop}, {size: bench.start}, files, saving, bench.knn())
        self.measure_sizes(configs.sizes(config))
        self.step_costs = {size: step_cost(at_size(config, size)) for size in configs.sizes(config)}

    @property
    def _ahead(self) -> bool:
        return 2 * self.loader.value > self.step.value

    def loop(self, **changes: int) -> tuple[Range, float]:
        """Seconds per step of the loop with options changed, and until its first step. Raises UserError if the options
        do not go together."""
        changed = configs.replace(self.config, **changes)
        with RunBench(changed, self.folder / "changed") as bench:
            return bench.loop(ahead=self._ahead)[0], bench.start

    def measure_sizes(self, sizes: tuple[int, ...]) -> None:
        """Measure the loop at these sizes, unless that was done before."""
        for size in {*sizes} - {*self.timings.loop}:
            loop, start = self.loop(size=size)
            loops, starts = {**self.timings.loop, size: loop}, {**self.timings.start, size: start}
            self.timings = dataclasses.replace(self.timings, loop=loops, start=starts)

    def parts(self) -> dict[str, tuple[int, Range]]:
        """The parts of the run, each with its number and its seconds in all."""
        return parts(self.config, self.timings, self.steps_per_epoch)

    def seconds(self, config: RunConfig | None = None, factor: float = 1.0) -> Range:
        """Seconds of the whole run, or of a changed one whose steps take `factor` times as long."""
        loop = {size: seconds * factor for size, seconds in self.timings.loop.items()}
        return total(config or self.config, dataclasses.replace(self.timings, loop=loop), self.steps_per_epoch)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in an epoch."""
        return self.setup.steps_per_epoch
