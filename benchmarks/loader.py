"""The cost of views on the host: this loader, the floor beneath it, and the peers as their users run them.

    python -m benchmarks.loader --data TRAIN.beton [--num-views 1 2 4 8] [--workers 1 2] [--size 224] [--json FILE]
    python -m benchmarks.loader --data TRAIN.beton --only floor cpu-crops cpu dali-full pil

Contestants are those of `benchmarks/contestants.py`, which says what each does and how to get the peers:

    floor                 libjpeg-turbo's decode and K uint8 antialiased resizes by the same boxes, nothing else
    cpu-crops, dali-crops, ffcv-crops, ...          our loader's backends to K uint8 crops: the host's work beside a GPU
    cpu, dali, ffcv, resident, synthetic, ...       our loader to normalised float views on the device
    pil, torchvision-v2, lightly, dali-full, ffcv-per-view      the peers to the same end
    dali-full-crops, ffcv-per-view-crops                        those two, stopped at the crops

Each has a process of its own; all go through the same images, round after round, in turn. Columns: CPU time of the
process and its workers per view; `x floor` in floors; `x ours` how many times the CPU time of our `cpu` (at the stage
of the crops: of our `cpu-crops`); views per second of elapsed time; `first batch`, seconds from opening the data to
the first batch, compilation included, imports not; `start`, the same with Python's start and all imports; peak
resident memory, in which the file's pages count that are mapped, and torch's own 0.4 GB; with several --workers the
`scaling` of views per second over the smallest number of them.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table

from benchmarks.common import (
    CommonOptions,
    Process,
    Report,
    Run,
    chosen,
    figure,
    interleave,
    main,
    ratio,
    spread,
    table,
)
from benchmarks.contestants import Contestant, contestants
from loaders.beton import MODE_JPEG, Reader
from loaders.errors import UserError

OURS = {"crops": "cpu-crops", "views": "cpu"}  # contestant that the column `x ours` compares with


def measure(config: CommonOptions) -> Report:
    """CPU time per view, views per second, first batch and memory: this loader, the floor and the peers."""
    with Reader(config.data) as reader:
        if (reader.mode[: config.images] != MODE_JPEG).any():
            raise UserError(f"{config.data} holds raw images, which the peers cannot decode; use a file of JPEGs")
    everybody = contestants()
    names = chosen(everybody, config)
    missing = {name: everybody[name].missing(torch.device(config.device)) for name in names}
    report = Report([], [], {name: why for name, why in missing.items() if why})
    names = [name for name in names if not missing[name]]
    for num_views in config.num_views:
        report.rows += _measure(config, num_views, [everybody[n] for n in names], report.skipped)
        report.tables.append(shown_table(config, num_views, [r for r in report.rows if r["num_views"] == num_views]))
    return report


def _measure(
    config: CommonOptions, num_views: int, who: Sequence[Contestant], skipped: dict[str, str]
) -> list[dict[str, Any]]:
    """The rows of one K."""
    with contextlib.ExitStack() as stack:
        processes: dict[tuple[str, int], Process] = {}
        for contestant, workers in itertools.product(who, config.workers):
            arguments = (contestant.build, config, num_views, workers)
            try:
                process = stack.enter_context(Process(*arguments, modules=contestant.modules))
            except UserError as error:  # a backend that cannot take this file
                skipped[contestant.name] = str(error)
                continue
            processes[contestant.name, workers] = process
        runs = interleave({key: p.run for key, p in processes.items()}, config.repeats, warm=True)
        num = config.images // config.batch_size * config.batch_size * num_views
        by_name = {c.name: c for c in who}
        rows = []
        for (name, workers), measured in runs.items():
            process = processes[name, workers]
            rows.append(
                {
                    "contestant": name,
                    "whose": by_name[name].whose,
                    "stage": by_name[name].stage,
                    "num_views": num_views,
                    "workers": workers,
                    "first_batch_s": process.start.first_batch_s,
                    "start_s": process.start.start_s,
                    "peak_rss_mb": process.peak_rss_mb,
                    **figures(measured, num),
                }
            )
    compare(rows)
    return rows


def figures(runs: Sequence[Run], num: int) -> dict[str, Any]:
    """Figures per view, of rounds of `num` views."""
    return {
        "cpu_ms_per_view": figure([1000 * run.cpu_s / num for run in runs]),
        "views_per_s": figure([num / run.elapsed_s for run in runs]),
    }


def compare(rows: Sequence[dict[str, Any]]) -> None:
    """Add to each row of one K: CPU time over the floor's and over ours with as many workers, and the scaling of
    views per second over the same contestant with the fewest workers; None where there is nobody to compare with."""
    find = {(row["contestant"], row["workers"]): row for row in rows}
    fewest = min((row["workers"] for row in rows), default=1)
    for row in rows:
        name, workers = row["contestant"], row["workers"]
        for column, other, metric in (
            ("cpu_over_floor", find.get(("floor", workers)), "cpu_ms_per_view"),
            ("cpu_over_ours", find.get((OURS[row["stage"]], workers)), "cpu_ms_per_view"),
            ("scaling", find.get((name, fewest)) if workers > fewest else None, "views_per_s"),
        ):
            row[column] = ratio(row[metric]["values"], other[metric]["values"]) if other else None


def shown_table(config: CommonOptions, num_views: int, rows: Sequence[dict[str, Any]]) -> Table:
    """The figures of one K for people."""
    several = len(config.workers) > 1
    return table(
        f"K = {num_views} views of {config.size} px on the {config.device}, {config.data.name}",
        rows,
        {
            **{name: name for name in ("contestant", "whose", "stage")},
            **({"workers": lambda row: str(row["workers"])} if several else {}),
            "CPU ms/view": "cpu_ms_per_view",
            "min-max": lambda row: spread(row["cpu_ms_per_view"]),
            "x floor": "cpu_over_floor",
            "x ours": "cpu_over_ours",
            "views/s": "views_per_s",
            "first batch s": "first_batch_s",
            "start s": "start_s",
            "peak MB": "peak_rss_mb",
            **({"scaling": "scaling"} if several else {}),
        },
    )


if __name__ == "__main__":
    sys.exit(main("loader", CommonOptions, measure))
