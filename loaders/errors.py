"""The one exception for bad input."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Input that cannot be used as given.

    The message is one line that says what is wrong, where, and what to do about it. Every console command prints that
    line and exits with status 2. All other exceptions are faults of the program and show a traceback.
    """


# More names than these do not fit on a line that one reads.
_MANY = 30


def unknown(what: str, name: str, choices: Iterable[str], *, listing: str = "") -> UserError:
    """The error for a name that is not among `choices`: it proposes the nearest name and lists all of them.

    Of more than 30 choices it shows the nearest ones only, and `listing`, the command that shows all.
    """
    choices = list(choices)
    if len(choices) > _MANY:
        near = difflib.get_close_matches(name, choices, n=4, cutoff=0.5)
        hints = [f"did you mean {' or '.join(map(repr, near))}?"] if near else []
        hints += [f"{listing} shows all"] if listing else []
        return UserError(f"unknown {what} {name!r}: {' '.join(hints)}")
    near = difflib.get_close_matches(name, choices, n=1)
    hint = f", did you mean {near[0]!r}?" if near else ","
    return UserError(f"unknown {what} {name!r}{hint} choose from: {', '.join(choices)}")
