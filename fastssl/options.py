"""Checks of option values that name the flag."""

from __future__ import annotations

from loaders.errors import UserError


def flag(name: str) -> str:
    """The command-line flag of an option."""
    return "--" + name.replace("_", "-")


def at_least(options: object, least: int, *names: str) -> None:
    """Raise UserError if one of these options is below `least`; None passes."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"{flag(name)} {value}: at least {least}")


def above_zero(options: object, *names: str) -> None:
    """Raise UserError if one of these options is not above 0."""
    for name in names:
        if not getattr(options, name) > 0:
            raise UserError(f"{flag(name)} {getattr(options, name)}: must be above 0")


def share(options: object, *names: str) -> None:
    """Raise UserError if one of these options is outside [0, 1]; None passes."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 <= value <= 1:
            raise UserError(f"{flag(name)} {value}: a number from 0 to 1")
