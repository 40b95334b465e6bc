"""Entry of the console commands: one-line errors and exit statuses."""

from __future__ import annotations

import sys
from collections.abc import Callable

from loaders.errors import UserError


def run_command(name: str, command: Callable[[list[str]], int], argv: list[str] | None) -> int:
    """Run a command on its arguments: bad input becomes one line on stderr and status 2, Ctrl-C status 130."""
    try:
        return command(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        return 130
