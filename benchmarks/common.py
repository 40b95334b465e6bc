"""Shared parts of the measuring commands: options, contestants, interleaved rounds, figures, the machine.

A contestant is measured in rounds: every contestant once, then every one again, each round in another order, so that
whatever else the machine does, and whatever one leaves behind for the next, meets all of them alike. The first round
warms up and is not counted. One figure of a contestant is the median over the rounds; a ratio of two contestants is
the median of the ratios within the rounds. CPU time is that of the process and of the worker processes it has; other
work on the machine disturbs it far less than elapsed time.

`Process` runs a contestant in a process of its own, which alone gives an honest peak of memory and an honest wait for
the first batch, and keeps the libraries of one out of the other's way. `timed` measures a function in this process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import pickle
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from loaders.checks import at_least, need
from loaders.errors import UserError, unknown
from loaders.machine import peak_host_memory, usable_cores

if TYPE_CHECKING:
    from rich.table import Table

Key = TypeVar("Key", bound=Hashable)
Row = dict[str, Any]  # of a table and of the JSON file

FILE_WIDTH = 140  # of tables that go to a file or a pipe, characters
ROOT = Path(__file__).parent.parent
PACKAGES = (
    *("torch", "torchvision", "numpy", "pillow", "triton", "timm", "nvidia-dali-cuda130", "nvidia-dali-cuda120"),
    *("ffcv", "numba", "opencv-python-headless", "lightly", "kornia"),
)


@dataclass(kw_only=True)
class CommonOptions:
    """Options of every command here."""

    data: Path
    """Images (.beton); ImageNet originals say most."""
    images: int = 512
    """Images per round; taken from the start of the file again if it holds fewer."""
    batch_size: int = 32
    """Images per batch."""
    repeats: int = 5
    """Rounds that count; one more comes before them."""
    num_views: tuple[int, ...] = (4,)
    """K, views per image: one or several values."""
    size: int = 224
    """Side of the views, px."""
    device: str = "auto"
    """Where the views are wanted: cpu, cuda, or auto: cuda if there is one."""
    workers: tuple[int, ...] = (1,)
    """Worker threads or processes of each contestant: one or several values."""
    only: tuple[str, ...] = ()
    """Measure these contestants only."""
    skip: tuple[str, ...] = ()
    """Leave these contestants out."""
    json: Path | None = None
    """Write every single measurement to this file."""

    def check(self) -> None:
        """Raise UserError for values that make no sense; settle `device`."""
        at_least(self, 1, "images", "batch_size", "repeats", "size")
        for flag, values in (("--num-views", self.num_views), ("--workers", self.workers)):
            need(min(values, default=0) >= 1, f"{flag} needs values of 1 or more")
        need(self.images >= self.batch_size, f"--images {self.images} is less than a batch of {self.batch_size}")
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        need(self.device.partition(":")[0] in ("cpu", "cuda"), f"--device {self.device}: give cpu, cuda or auto")
        need(
            self.device == "cpu" or torch.cuda.is_available(),
            f"--device {self.device}: torch sees no CUDA device; use --device cpu",
        )


def chosen(names: Iterable[str], config: CommonOptions) -> list[str]:
    """The names left by --only and --skip, in their order. Raises UserError for a name nobody has."""
    names = list(names)
    for name in (*config.only, *config.skip):
        if name not in names:
            raise unknown("contestant", name, names)
    return [n for n in names if (not config.only or n in config.only) and n not in config.skip]


def not_installed(package: str, install: str) -> str | None:
    """The reason to skip a contestant that needs `package`: None if it is there."""
    try:
        found = importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # not even the package it is in
        found = False
    return None if found else f"{package} is not installed: {install}"


# --- Measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """Time that one round of one contestant took."""

    elapsed_s: float
    cpu_s: float


def cpu_seconds() -> float:
    """CPU time of this process and of its children, those that have ended (and were waited for) and those alive."""
    # active_children() also waits for those that have just ended, so they are counted once and only once.
    alive = [child.pid for child in multiprocessing.active_children()]
    ended = os.times()
    return time.process_time() + ended.children_user + ended.children_system + sum(map(_cpu_seconds_of, alive))


def _cpu_seconds_of(pid: int) -> float:
    """CPU time of a process, in nanoseconds' resolution, by the clock that Linux keeps for it."""
    with contextlib.suppress(OSError):
        return time.clock_gettime(((~pid) << 3) | 2)  # MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED)
    return 0.0


def synchronize() -> None:
    """Wait for the GPU, if this process uses one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def drop_cache(*paths: Path) -> None:
    """Throw files that nobody has mapped out of the system's page cache."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # only clean pages can go
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(function: Callable[[int], object]) -> Callable[[int], Run]:
    """Make a contestant of `function`, which is given the number of the round, in this process."""

    def run(number: int) -> Run:
        synchronize()
        cpu, start = cpu_seconds(), time.perf_counter()
        function(number)
        synchronize()
        return Run(time.perf_counter() - start, cpu_seconds() - cpu)

    return run


def timed_on(device: torch.device, function: Callable[[int], object]) -> Callable[[int], Run]:
    """Make a contestant like `timed`; on a GPU its elapsed time is the GPU's own, between events on the stream."""
    if device.type != "cuda":
        return timed(function)

    def run(number: int) -> Run:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        cpu = cpu_seconds()
        with torch.cuda.device(device):
            begin.record()
            function(number)
            end.record()
        end.synchronize()
        return Run(begin.elapsed_time(end) / 1000, cpu_seconds() - cpu)

    return run


def interleave(runs: Mapping[Key, Callable[[int], Run]], repeats: int, *, warm: bool = False) -> dict[Key, list[Run]]:
    """Rounds 1 to `repeats` of all contestants, one Run each; before them round 0, unless they are `warm`."""
    measured: dict[Key, list[Run]] = {key: [] for key in runs}
    for number in range(1 if warm else 0, repeats + 1):
        keys = list(runs)
        random.Random(number).shuffle(keys)
        for key in keys:
            run = runs[key](number)
            if number:
                measured[key].append(run)
    return measured


# --- A contestant in a process of its own -----------------------------------------------------------------------------

Batches = Callable[[int], Iterable[object]]  # the number of the round -> its batches


@dataclass(frozen=True)
class Start:
    """Time until the first batch: from opening the data, and from the start of the process (imports)."""

    first_batch_s: float
    start_s: float


class Process:
    """Runs `build(*arguments)`, which gives the batches of a round, in a new Python process; round 0 at once.

    `build` and the arguments must pickle, `build` from a module other than __main__: importing that module is not
    part of `first_batch_s`, nor are `modules`, which are imported before.
    Raises what `build` and its batches raise: UserError unchanged, all else as RuntimeError with the output.
    """

    def __init__(self, build: Callable[..., Batches], *arguments: object, modules: Sequence[str] = ()):
        self._printed = tempfile.TemporaryFile("w+")  # noqa: SIM115 (close() closes it)
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from benchmarks.common import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._printed,
            env=os.environ | {"PYTHONPATH": path},
        )
        try:
            self.start: Start = self._ask((time.monotonic(), modules, pickle.dumps((build, arguments))))
        except BaseException:
            self.close()
            raise
        self.peak_rss_mb = 0.0

    def run(self, number: int) -> Run:
        """Go through the batches of one round."""
        run, self.peak_rss_mb = self._ask(number)
        return run

    def _ask(self, question: object) -> Any:
        try:
            pickle.dump(question, self._process.stdin)
            self._process.stdin.flush()
            answer = pickle.load(self._process.stdout)
        except (BrokenPipeError, EOFError):
            status = self._process.wait()
            self._printed.seek(0)
            raise RuntimeError(f"a contestant's process ended with {status}:\n{self._printed.read()}") from None
        if isinstance(answer, UserError):
            raise answer
        return answer

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()  # FFCV's threads do not always end
            self._process.wait()
        self._process.stdout.close()
        self._printed.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def serve() -> None:
    """The other end of `Process`. Questions come on stdin; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def answer(value: object) -> None:
        pickle.dump(value, answers)
        answers.flush()

    status = 0
    try:
        started, modules, pickled = pickle.load(sys.stdin.buffer)
        for module in modules:
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise UserError(f"{module} cannot be imported: {error}") from error
        build, arguments = pickle.loads(pickled)
        opened = time.monotonic()
        batches = build(*arguments)
        first = None
        for _batch in batches(0):
            if first is None:
                synchronize()
                first = time.monotonic()
        answer(Start(first - opened, first - started))

        def consume(number: int) -> None:
            for _batch in batches(number):
                pass

        run = timed(consume)
        with contextlib.suppress(EOFError):
            while True:
                number = pickle.load(sys.stdin.buffer)
                answer((run(number), peak_rss_mb()))
    except UserError as error:
        answer(UserError(str(error)))  # its subclasses may not pickle
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        status = 1
    for child in multiprocessing.active_children():
        child.terminate()
    os._exit(status)  # threads of FFCV and DALI would keep the interpreter waiting, or crash on its way out


def peak_rss_mb() -> float:
    """Peak resident memory of this process and its living workers, MB (pages they share count in each)."""
    pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    return sum(map(peak_host_memory, pids)) / 1e6


# --- Figures ----------------------------------------------------------------------------------------------------------


def figure(values: Sequence[float]) -> dict[str, Any]:
    """Median, smallest and largest, and the values themselves."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": list(values)}


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, Any]:
    """Figure of `over` / `under`, round by round."""
    return figure([a / b for a, b in zip(over, under, strict=True)])


def shown(value: dict[str, Any] | float | None, digits: int = 3) -> str:
    """A figure's median (or a number) to so many significant digits, for a table; '-' for none."""
    number = value["median"] if isinstance(value, dict) else value
    if number is None or number != number:
        return "-"
    if abs(number) >= 10**digits - 0.5:
        return f"{number:,.0f}"
    return f"{number:#.{digits}g}".rstrip(".")


def spread(value: dict[str, Any]) -> str:
    """Smallest and largest of a figure, for a table."""
    return f"{shown(value['min'])}-{shown(value['max'])}"


def table(
    title: str, rows: Sequence[dict[str, Any]], columns: Mapping[str, str | Callable[[dict[str, Any]], Any]]
) -> Table:
    """Rows for people. `columns`: header -> key of the row, or function of the row; figures and numbers are rounded."""
    from rich.table import Table  # not above: contestants' processes show nothing

    out = Table(title=title, title_justify="left")
    cells = [[row[c] if isinstance(c, str) else c(row) for c in columns.values()] for row in rows]
    for number, (header, column) in enumerate(columns.items()):
        text = isinstance(column, str) and all(isinstance(cell[number], str) for cell in cells)
        out.add_column(header, justify="left" if text else "right", no_wrap=text)
    for line in cells:
        out.add_row(*(cell if isinstance(cell, str) else shown(cell) for cell in line))
    return out


@dataclass
class Report:
    """Result of a command: rows for the JSON file, tables (of rich) for people, and who was left out, and why."""

    rows: list[dict[str, Any]]
    tables: list[Table]
    skipped: dict[str, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)  # what else belongs into the JSON file


def machine() -> dict[str, Any]:
    """CPU, cores, memory, GPU, load and versions."""
    about: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": None,
        "load": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {},
        "commit": _commit(),
    }
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            about["versions"][package] = importlib.metadata.version(package)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        about["gpu"] = {
            "name": properties.name,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return about


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _commit() -> str | None:
    """Commit of the checkout, with '+' if files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True).stdout

    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return git("rev-parse", "--short", "HEAD").strip() + ("+" if git("status", "--porcelain").strip() else "")
    return None


def write_json(path: Path, name: str, config: Any, report: Report) -> None:
    """Write everything measured, with the options (a dataclass) and the machine."""
    content = {
        "benchmark": name,
        "options": dataclasses.asdict(config),
        "machine": machine(),
        **report.about,
        "skipped": report.skipped,
        "results": report.rows,
    }
    path.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


def main(
    name: str, config_class: type[CommonOptions], measure: Callable[[Any], Report], argv: Sequence[str] | None = None
) -> int:
    """Run a whole command: options -> measure -> table (and file). Returns the exit status.

    The first line of `measure`'s docstring is the command's description.
    """
    import tyro  # not above: contestants' processes import this module, and have no use for command lines and tables
    from rich.console import Console

    from fastssl.cli import run_command

    def command(arguments: list[str]) -> int:
        config = tyro.cli(
            config_class, prog=f"python -m benchmarks.{name}", description=measure.__doc__, args=arguments
        )
        config.check()
        if config.json is not None and not config.json.parent.is_dir():
            raise UserError(f"the folder {config.json.parent} of --json does not exist; make it first")
        report = measure(config)
        console = Console()
        if not console.is_terminal:
            console.width = FILE_WIDTH
        for table in report.tables:
            console.print(table)
        for who, why in report.skipped.items():
            console.print(f"without {who}: {why}", highlight=False, markup=False)
        if config.json is not None:
            write_json(config.json, name, config, report)
        return 0

    return run_command(f"benchmarks.{name}", command, list(argv) if argv is not None else None)
