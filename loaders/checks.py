"""Rules for option values: one place and one form, with errors that name the flag.

need(options.epochs >= 1, "--epochs 0: at least 1")         any rule
at_least(options, 1, "epochs", "log_every")                 the common ones, by field name
"""

from __future__ import annotations

from loaders.errors import UserError


class Options:
    """Base of option classes: `validate` checks what the class's own fields have to satisfy.

    Classes that are combined by inheritance each check their part and call `super().validate()`.
    """

    def validate(self) -> None:
        """Raise UserError for values that make no sense."""


def need(ok: bool, message: str) -> None:
    """Raise UserError with `message` unless `ok`."""
    if not ok:
        raise UserError(message)


def flag(name: str) -> str:
    """The command-line flag of an option."""
    return "--" + name.replace("_", "-")


def at_least(options: object, least: float, *names: str) -> None:
    """Raise UserError if one of these options is below `least`; None passes."""
    for name in names:
        value = getattr(options, name)
        need(value is None or value >= least, f"{flag(name)} {value}: at least {least}")


def above_zero(options: object, *names: str) -> None:
    """Raise UserError if one of these options is not above 0; None passes."""
    for name in names:
        value = getattr(options, name)
        need(value is None or value > 0, f"{flag(name)} {value}: must be above 0")


def share(options: object, *names: str) -> None:
    """Raise UserError if one of these options is outside [0, 1]; None passes."""
    for name in names:
        value = getattr(options, name)
        need(value is None or 0 <= value <= 1, f"{flag(name)} {value}: a number from 0 to 1")
