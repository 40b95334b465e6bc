"""Hours of training on ImageNet for known cards: the table of docs/cost.md. Derived (planning/cards.py), not run.

    python -m benchmarks.budget [PRESET [OPTIONS]]

Without a preset: the recipes of docs/cost.md. Hours are of the training steps alone, on a card that is kept fed. Memory
is what the step has in use at once and the batches that wait on the card, without driver and work space.
"""

from __future__ import annotations

import sys

from fastssl.cli import run_command
from fastssl.config import schema as configs
from fastssl.config.command_line import parse
from fastssl.config.schema import RunConfig
from fastssl.planning.cards import CARDS, Card, seconds_per_image
from fastssl.planning.cost import StepCost, step_cost
from fastssl.planning.schedule import at_size, steps_by_size, waiting_bytes
from fastssl.training.log import figures

IMAGENET = 1_281_167
SHOWN = ("RTX 2080 Ti", "RTX 3090", "RTX 4090", "A100 80 GB", "H100")
RECIPES = (
    "fastsiam-imagenet-25ep",
    "fastsiam-imagenet-25ep --size-schedule 128:160:224",
    "fastsiam-imagenet-10ep",
    "fastsiam-imagenet-25ep --backbone resnet18",
    "simsiam-imagenet-100ep --micro-batch 64",
    "fastmoco-imagenet-100ep --micro-batch 32",
    "dino-sslight-mnv2-imagenet-200ep --micro-batch 32",
)


def hours(config: RunConfig, costs: dict[int, StepCost], images: int = IMAGENET) -> dict[str, float]:
    """Hours of the training steps, by card. `costs`: the cost of a step, by size of the views."""
    batch = config.data.batch_size
    steps = steps_by_size(config, images // batch)

    def seconds(card: Card) -> float:
        return sum(num * batch * seconds_per_image(card, costs[size])[0] for size, num in steps.items())

    return {card.name: seconds(card) / 3600 for card in CARDS if card.name in SHOWN}


def memory(config: RunConfig, costs: dict[int, StepCost]) -> float:
    """Bytes in use at once by the step, and by the batches that wait beside it."""
    return max(cost.peak for cost in costs.values()) + waiting_bytes(config)


def row(recipe: str) -> str:
    """A line of the table."""
    config = parse([*recipe.split(), "--data", "ImageNet"])  # which is not opened
    configs.validate(config)
    costs = {size: step_cost(at_size(config, size)) for size in configs.sizes(config)}
    cells = [f"`{recipe}`", f"{memory(config, costs) / 1e9:.1f} GB", *map(figures, hours(config, costs).values())]
    return f"| {' | '.join(cells)} | derived |"


def table(recipes: tuple[str, ...] = RECIPES) -> list[str]:
    """The lines of the table, in Markdown."""
    head = ("recipe", "GPU memory", *(f"{name}, h" for name in SHOWN), "basis")
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *map(row, recipes)]


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""

    def command(arguments: list[str]) -> int:
        if {"-h", "--help"} & {*arguments}:
            print(__doc__)
        else:
            print("\n".join(table((" ".join(arguments),) if arguments else RECIPES)))
        return 0

    return run_command("benchmarks.budget", command, argv)


if __name__ == "__main__":
    sys.exit(main())
