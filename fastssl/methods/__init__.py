"""Methods: one file each, found by module name.

A method module defines `Config`, its options (a `base.MethodOptions`), and `Method` (a `base.Method`), whose docstrings
say what each part is for. A new method is one new file; nothing else names it.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from loaders.errors import unknown


def available() -> list[str]:
    """Names of the methods in this folder, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "base")


def load(name: str) -> ModuleType:
    """The module of method `name`. Raises UserError for an unknown name."""
    if name not in available():
        raise unknown("method", name, available())
    return importlib.import_module(f"{__name__}.{name}")
