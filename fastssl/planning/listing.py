"""fastssl-train --list: the recipes, with source, published result and estimated cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastssl.config import presets
from fastssl.config.presets import Preset
from fastssl.planning.cost import ASSUMED_CARD, ASSUMED_FLOPS_PER_S, ASSUMED_VIEWS_PER_S, cost
from fastssl.training.log import figures
from loaders.errors import UserError


def list_presets(words: Sequence[str] = ()) -> None:
    """Print the presets that have all `words` in their names, with source, published result and estimated cost; with
    words, their notes and the rows that options make of them, too. Raises UserError if there are none."""
    chosen = [p for p in presets.PRESETS.values() if all(word in p.name for word in words)]
    if not chosen:
        raise UserError(f"--list {' '.join(words)}: no preset has that in its name; fastssl-train --list shows all")
    console = Console()
    if not console.is_terminal:
        console.width = 10_000  # in a pipe each preset is one line
    console.print(preset_table(chosen))
    console.print(_CAPTION, highlight=False, markup=False)
    for preset in chosen if words else ():
        if preset.rows or preset.notes:
            console.print(Text(f"\n{preset.name}", style="bold"))
        if preset.notes:
            console.print(Text(preset.notes))
        width = max(map(len, preset.rows), default=0)
        for options, result in preset.rows.items():
            console.print(Text(f"  {options:{width}}  {result}"))


def preset_table(chosen: Iterable[Preset]) -> Table:
    """One row for each preset."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1))
    table.add_column("preset", no_wrap=True, style="bold")
    table.add_column("source")
    table.add_column("published result")
    for title in ("views, M", "EFLOP", "hours"):
        table.add_column(title, justify="right", no_wrap=True)
    for preset in chosen:
        estimate = cost(preset.make(), preset.num_images)
        numbers = [figures(n) if n >= 0.01 else "<0.01" for n in (estimate.views / 1e6, estimate.flops / 1e18)]
        numbers.append(figures(estimate.hours) if estimate.hours >= 0.01 else "<0.01")
        table.add_row(preset.name, preset.source, preset.result, *numbers)
    return table


_CAPTION = (
    "\nResults are top-1 on the data set in the name, linear classifier or kNN, unless they say otherwise. Estimates: "
    "views = images x epochs x views of an image, small crops included; EFLOP = 10^18 operations, counted on the "
    "networks at these sizes, the forward pass three times where it is trained, once where it only makes targets; "
    f"hours assume, unmeasured, that one {ASSUMED_CARD} sustains {ASSUMED_FLOPS_PER_S / 1e12:g} TFLOP/s "
    f"({ASSUMED_VIEWS_PER_S} ResNet-50 views of 224 px per second, forward and backward, fp16): small and depth-wise "
    "networks reach less; --plan counts better. --list WORD shows the presets with WORD in their names, their notes, "
    "and options for more published rows."
)
