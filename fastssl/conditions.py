"""Conditions under which options are read, declared in the class of the options:

    READ_IF = {"momentum": one_of("optimizer", "sgd", "lars")}

`fastssl-train` refuses an option that the user gives though its condition does not hold (config/schema.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from loaders.checks import flag

Values = Mapping[str, Any]
"""Values of all options of a run, by name."""


@dataclass(frozen=True)
class Condition:
    """Requirement for an option to be read."""

    options: tuple[str, ...]
    """Names of the options that decide it."""
    holds: Callable[[Values], bool]
    words: str
    """The flags that make it hold, for the sentence "it needs ..."."""


def one_of(option: str, *values: object) -> Condition:
    """Condition that `option` has one of these values."""
    return Condition((option,), lambda v: v[option] in values, f"{flag(option)} {' or '.join(map(str, values))}")


def other_than(option: str, value: object) -> Condition:
    """Condition that `option` has any value but this one."""
    return Condition((option,), lambda v: v[option] != value, f"{flag(option)} other than {value}")


def given(option: str) -> Condition:
    """Condition that `option` is on, or has a value."""
    return Condition((option,), lambda v: bool(v[option]), flag(option))


def above(option: str, limit: float) -> Condition:
    """Condition that `option` is greater than `limit`."""
    return Condition((option,), lambda v: v[option] > limit, f"{flag(option)} above {limit}")


def starts_with(option: str, *prefixes: str) -> Condition:
    """Condition that `option` is a name that begins with one of these."""
    return Condition(
        (option,), lambda v: v[option].startswith(prefixes), f"{flag(option)} {' or '.join(p + '*' for p in prefixes)}"
    )


def unlike(option: str, other: str) -> Condition:
    """Condition that two options differ."""
    return Condition((option, other), lambda v: v[option] != v[other], f"{flag(option)} other than {flag(other)}")


def never(words: str) -> Condition:
    """Condition that no option meets: for options of the run that a method does not read; `words` say which do."""
    return Condition((), lambda _: False, words)


JOINT = {"bn_statistics": never("a method that encodes views one by one")}
"""For methods whose BatchNorm statistics are those of all views together in any case."""


def conditions(options: type) -> dict[str, Condition]:
    """The conditions that a class of options and its bases declare, by option; those of a subclass win."""
    found: dict[str, Condition] = {}
    for part in reversed(options.__mro__):
        found |= vars(part).get("READ_IF", {})
    return found
