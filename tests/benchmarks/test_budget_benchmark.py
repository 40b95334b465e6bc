"""Hours on known cards: what they are counted from, and that the pages have the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.budget import IMAGENET, RECIPES, hours, main, memory, row, table
from fastssl.config.command_line import parse
from fastssl.planning.cards import EFFICIENCY, card
from fastssl.planning.cost import StepCost

ROOT = Path(__file__).parents[2]
README, PAGE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/cost.md"))
# 1 ms per image.
MOVING = StepCost(flops=1, bytes=EFFICIENCY * card("RTX 3090").bandwidth / 1000, peak=4e9, operations=1)


def config(*options: str):
    return parse(["fastsiam-imagenet-25ep", "--data", "ImageNet", *options])


def test_hours_are_images_times_epochs_times_the_time_of_an_image() -> None:
    seconds = 25 * (IMAGENET // 32) * 32 / 1000
    assert hours(config(), {224: MOVING})["RTX 3090"] == pytest.approx(seconds / 3600)


def test_sizes_count_with_their_share_of_the_epochs() -> None:
    slow = StepCost(flops=1, bytes=2 * MOVING.bytes, peak=5e9, operations=1)
    schedule = config("--size-schedule", "128:224", "--epochs", "4")
    found = hours(schedule, {128: MOVING, 224: slow})["RTX 3090"]
    assert found == pytest.approx(4 * 1.5 * (IMAGENET // 32) * 32 / 1000 / 3600)
    assert memory(schedule, {128: MOVING, 224: slow}) == 5e9 + 3 * 32 * 4 * 3 * 224**2 * 2


def test_batches_do_not_wait_on_the_card_beside_micro_batches() -> None:
    assert memory(config("--micro-batch", "8"), {224: MOVING}) == 4e9


def test_the_first_row_of_the_page() -> None:
    assert row(RECIPES[0]) in PAGE


def test_the_rows_of_the_readme_are_those_of_the_page() -> None:
    rows = [line for line in README.splitlines() if line.endswith(" derived |")]
    assert rows and all(line in PAGE for line in rows)


@pytest.mark.slow
def test_the_whole_table_of_the_page() -> None:
    assert "\n".join(table()) in PAGE


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fastsiam-imagenet-25ep", "--backbone", "resnet18", "--size", "64"]) == 0
    *_, line = capsys.readouterr().out.splitlines()
    assert line.startswith("| `fastsiam-imagenet-25ep --backbone resnet18 --size 64` | ") and line.endswith("derived |")
    assert main(["no-such-recipe"]) == 2
    assert "unknown preset" in capsys.readouterr().err
