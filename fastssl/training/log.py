"""The log of a run: live line, metrics.jsonl, views.png, curves.png."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

METRICS = "metrics.jsonl"
_PLAIN_SECONDS = 30.0  # between lines where the output is no terminal


def duration(seconds: float) -> str:
    """Seconds as 12s, 3m05s, 2h07m or 4d03h."""
    seconds = round(max(0.0, seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86_400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86_400}d{seconds % 86_400 // 3600:02d}h"


def figures(value: float) -> str:
    """A number with three digits or more: 2.54, 25.4, 254, 2,540."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


class Log:
    """One live line on a terminal, or a plain one now and then elsewhere, and every entry in metrics.jsonl."""

    def __init__(self, folder: Path, console: Console | None = None):
        self.console = console or Console()
        self.path = folder / METRICS
        self.live: Live | None = None
        self.last_plain = -math.inf

    def __enter__(self) -> Log:
        """Take over the last line of the terminal, up to the end of the block."""
        if self.console.is_terminal:
            self.live = Live(Text(""), console=self.console, refresh_per_second=4, transient=False)
            self.live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def show(self, line: str, *, force: bool = False) -> None:
        """Put `line` on the screen: at once on a terminal, every half minute (or if forced) elsewhere."""
        if self.live is not None:
            self.live.update(Text(line, no_wrap=True, overflow="ellipsis"))
        elif force or time.monotonic() - self.last_plain >= _PLAIN_SECONDS:
            self.last_plain = time.monotonic()
            self.console.print(line, soft_wrap=True, highlight=False)

    def say(self, message: str) -> None:
        """Print a line that stays."""
        self.console.print(message, soft_wrap=True, highlight=False)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The entries of a metrics.jsonl; a last line cut off by a crash is left out."""
    entries = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return entries


def truncate_metrics(path: Path, step: int) -> None:
    """Drop entries after `step`: a resumed run logs these steps again."""
    entries = [e for e in read_metrics(path) if e.get("step", 0) <= step]
    path.write_text("".join(json.dumps(e) + "\n" for e in entries), encoding="utf-8")


def save_views(path: Path, views: list[torch.Tensor], mean: tuple, std: tuple, *, num_images: int = 8) -> None:
    """Draw what the network sees: a row for each image, a column for each view, without normalisation."""
    from PIL import Image

    num_images = min(num_images, len(views[0]))
    scale, gap = max(1, round(96 / max(v.shape[-1] for v in views))), 4
    mean_3, std_3 = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
    sides = [v.shape[-1] * scale for v in views]
    grid = Image.new("RGB", (sum(sides) + gap * (len(views) + 1), (max(sides) + gap) * num_images + gap), "white")
    left = gap
    for view, side in zip(views, sides, strict=True):
        pixels = (view[:num_images].float().cpu() * std_3 + mean_3).clamp(0, 1).mul(255).round().byte()
        for row, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
            tile = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
            grid.paste(tile, (left, gap + row * (max(sides) + gap)))
        left += side + gap
    grid.save(path)


def save_curves(path: Path, entries: list[dict[str, Any]], healthy_std: float) -> None:
    """Draw loss, feature std, kNN accuracy and speed over the run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [e for e in entries if "loss" in e]
    knn = [e for e in entries if "knn" in e]
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.6), layout="constrained")
    epochs = [e["epoch"] for e in steps]
    for axis, key, title in ((axes[0], "loss", "loss"), (axes[1], "feature_std", "std of normalised features")):
        axis.plot(epochs, [e.get(key, math.nan) for e in steps], linewidth=0.8, color="tab:blue")
        axis.set(title=title, xlabel="epoch")
    axes[1].axhline(healthy_std, color="gray", linestyle="--", linewidth=0.8, label="1/sqrt(d), healthy")
    axes[1].set_ylim(0, healthy_std * 1.25)
    axes[1].legend(loc="lower right")
    if knn:
        axes[2].plot([e["epoch"] for e in knn], [e["knn"] for e in knn], marker="o", color="tab:green")
        axes[2].axhline(knn[0]["knn"], color="gray", linestyle="--", linewidth=0.8, label="at the start")
        axes[2].legend(loc="lower right")
    axes[2].set(title="kNN top-1, %", xlabel="epoch")
    axes[3].plot(epochs, [e.get("views_per_s", math.nan) for e in steps], linewidth=0.8, color="tab:orange")
    axes[3].set(title="views/s", xlabel="epoch")
    axes[3].set_ylim(bottom=0)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(console: Console, title: str, rows: list[tuple[str, str]]) -> None:
    """Print a two-column table."""
    shown = Table(title=title, show_header=False, title_justify="left")
    shown.add_column(style="bold")
    shown.add_column()
    for name, value in rows:
        shown.add_row(name, value)
    console.print(shown)
