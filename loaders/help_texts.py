"""Help texts of command-line options without the line breaks of the source."""

from __future__ import annotations

from typing import Annotated, TypeVar

import docstring_parser
import tyro

Options = TypeVar("Options")
_joined: set[type] = set()


def flowing(options: type[Options]) -> type[Options]:
    """Join the lines of the docstrings of a dataclass's fields, and return the class.

    tyro keeps the line breaks of docstrings whose lines are indented, as those of fields are.
    """
    for part in options.__mro__:
        hints = vars(part).get("__annotations__", {})
        for field in docstring_parser.parse_from_object(part).params if hints and part not in _joined else ():
            if field.arg_name in hints and field.description:
                text = tyro.conf.arg(help=" ".join(field.description.split()))
                hints[field.arg_name] = Annotated[hints[field.arg_name], text]
        _joined.add(part)
    return options
