"""The texts of a run for people: at the start, while it trains, and at the end."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypedDict

import torch

from fastssl import export
from fastssl.evaluate.recalibrate import NAME as RECALIBRATED
from fastssl.training.build import Setup
from fastssl.training.log import Log, duration, figures


class Result(TypedDict):
    """The result of a run."""

    steps: int
    hours: float
    """Hours of training, over all its resumptions."""
    images_per_s: float
    peak_memory_gb: float
    best_knn: float | None
    stopped: str | None
    """The signal that stopped the run early."""
    folder: Path


def announce(setup: Setup, log: Log, folder: Path) -> None:
    """Say what will be trained, on what, and where it is written."""
    config, count = setup.config, sum(p.numel() for p in setup.method.backbone.parameters())
    log.say(
        f"{config.model.method}, {config.model.backbone} ({count / 1e6:.1f} M parameters), "
        f"{len(setup.reader)} images, {setup.spec.K} views of {config.data.size} px, batch {config.data.batch_size}, "
        f"learning rate {setup.step.base_lr:g}, {config.optim.epochs} epochs of {setup.steps_per_epoch} steps"
    )
    name = torch.cuda.get_device_name(setup.device) if setup.on_gpu else "CPU"
    processes = f", {setup.world.size} processes" if setup.world.size > 1 else ""
    log.say(f"{name}, {setup.precision}{processes}; run folder {folder}")
    why = f" ({setup.loader.choice.why})" if setup.loader.choice else ""
    log.say(f"backend {setup.loader.backend.name}{why}")


def live_line(setup: Setup, entry: dict[str, Any], knn: float | None) -> str:
    """An entry of metrics.jsonl in one line; `knn`: the monitor's last answer, %."""
    config = setup.config
    left = (setup.total_steps - entry["step"]) * config.data.batch_size / entry["images_per_s"]
    parts = [
        f"epoch {entry['epoch']:.2f}/{config.optim.epochs}",
        f"loss {entry['loss']:.4f}",
        f"{figures(entry['images_per_s'])} images/s",
        f"{figures(entry['views_per_s'])} views/s",
        f"wait {100 * entry['wait_share']:.1f} %",
    ]
    if "feature_std" in entry:
        parts.append(f"std {entry['feature_std']:.4f} (healthy {setup.method.healthy_std:.4f})")
    if knn is not None:
        parts.append(f"kNN {knn:.1f} %")
    return "  ".join([*parts, f"ETA {duration(left)}"])


def rows(setup: Setup, result: Result, entries: list[dict[str, Any]], knn: float | None) -> list[tuple[str, str]]:
    """The table at the end of a run. `entries`: those of metrics.jsonl; `knn`: the monitor's last answer, %."""
    hours, speed, folder = result["hours"], result["images_per_s"], result["folder"]
    waits = [e["wait_share"] for e in entries if "wait_share" in e]
    found = [
        ("training time", f"{duration(3600 * hours)} ({hours:.2f} h)"),
        ("images/s", f"{speed:.1f} ({speed * setup.spec.K:.1f} views/s)"),
        ("waiting for data", f"{100 * sum(waits) / max(1, len(waits)):.1f} %"),
        ("peak memory", f"{result['peak_memory_gb']:.2f} GB ({'GPU' if setup.on_gpu else 'host'})"),
    ]
    if setup.loader.stats.replaced:
        found.append(("broken samples replaced", str(setup.loader.stats.replaced)))
    if result["best_knn"] is not None:
        first = next((e["knn"] for e in entries if "knn" in e), math.nan)
        found.append(("kNN top-1", f"{result['best_knn']:.1f} % best, {knn:.1f} % last, {first:.1f} % at the start"))
    if second := [e["knn_recalibrated"] for e in entries if "knn_recalibrated" in e]:
        found.append(("  BatchNorm recalibrated", f"{max(second):.1f} % best, {second[-1]:.1f} % last"))
    found.append(("weights", str(folder / export.NAME)))
    if setup.config.run.recalibrate_bn:
        found.append(("  BatchNorm recalibrated", str(folder / RECALIBRATED)))
    return found
