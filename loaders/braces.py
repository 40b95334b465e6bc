"""Brace expansion of file names: `part-{00..15}.beton`, `{a,b}.tar`."""

from __future__ import annotations

import re
from pathlib import Path

import bracex

from loaders.errors import UserError


def expand_braces(pattern: str) -> list[str]:
    """All names that a pattern stands for, in order: `a-{08..10}.tar` gives a-08.tar a-09.tar a-10.tar.

    The name of a file that exists is not expanded. Raises UserError for a range that counts down, which is
    more likely a mistake than intended.
    """
    if "{" not in pattern or Path(pattern).exists():
        return [pattern]
    for first, last in re.findall(r"\{(\d+)\.\.(\d+)\}", pattern):
        if int(last) < int(first):
            raise UserError(f"{pattern}: the range {{{first}..{last}}} is empty; write the smaller number first")
    return bracex.expand(pattern, keep_escapes=True, limit=0)


def expand_list(names: str) -> list[str]:
    """Names of several patterns with commas between them; commas inside braces belong to the braces."""
    # An empty first item makes any list one that braces can hold; it goes with other empty ones.
    expanded = expand_braces(f"{{,{names}}}")
    return [name.strip() for name in expanded if name.strip()]
