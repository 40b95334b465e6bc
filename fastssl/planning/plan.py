"""fastssl-train --plan: what a run will cost, measured on this machine before it starts. --fit: what meets a budget.

planning/bench.py tells how a run is measured, planning/schedule.py how its parts are counted. Figures for other cards
are derived (planning/cards.py).
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from pathlib import Path

from rich.console import Console

from fastssl.config import schema as configs
from fastssl.config.command_line import default_folder
from fastssl.config.schema import RunConfig
from fastssl.planning import tables
from fastssl.planning.forecast import Forecast
from fastssl.training import memory
from fastssl.training.log import duration
from loaders.errors import UserError

_WIDTH = 140  # of tables that go to a file or a pipe, characters


def run(config: RunConfig, console: Console | None = None) -> int:
    """The command. Returns the exit status. Raises UserError for a run that could not start."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--plan measures one process: start it without torchrun, with one process's --batch-size")
    if config.run.fit is not None and config.run.max_steps is not None:
        raise UserError("--fit counts whole runs: leave --max-steps out")
    configs.validate(config)
    console = console or Console()
    if not console.is_terminal:
        console.width = _WIDTH
    real = Path(config.run.out) if config.run.out else default_folder(config)
    with _scratch(real) as folder, memory.advice(config):
        start = time.perf_counter()
        forecast = Forecast(config, Path(folder))
        fit = tables.fit(forecast, 3600 * config.run.fit) if config.run.fit is not None else ()
        shown = (tables.stages(forecast), tables.hours(forecast), tables.disk(forecast, real), tables.cards(forecast))
        for item in itertools.chain(*shown, fit):
            console.print(item, highlight=False, markup=False, soft_wrap=isinstance(item, str))
        console.print(f"\nmeasured for {duration(time.perf_counter() - start)}; nothing was trained, nothing is kept")
    return 0


def _scratch(real: Path) -> tempfile.TemporaryDirectory:
    """A folder on the same disk as the run's, so that checkpoints take as long; elsewhere if that is read-only."""
    parent = next(p for p in real.absolute().parents if p.is_dir())
    return tempfile.TemporaryDirectory(prefix=".fastssl-plan-", dir=parent if os.access(parent, os.W_OK) else None)
