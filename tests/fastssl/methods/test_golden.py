"""Losses are those that tests/golden/losses.json has on record."""

from __future__ import annotations

import pytest
from golden import make

from fastssl.config.presets import PRESETS

ENTRIES, RECORDED = make.entries(), make.recorded()


@pytest.mark.parametrize("name", RECORDED)
def test_losses_are_those_on_record(name: str) -> None:
    assert name in ENTRIES, f"{name} is on record and in no list: python -m tests.golden.make"
    found = make.losses(*ENTRIES[name])
    assert make.same(RECORDED[name], found), (
        f"{RECORDED[name]} are on record, now it is {found}; see tests/golden/make.py"
    )


def test_what_has_a_preset_is_on_record() -> None:
    published = {preset.method for preset in PRESETS.values()}
    assert published | make.ADDONS.keys() <= RECORDED.keys(), "python -m tests.golden.make"
