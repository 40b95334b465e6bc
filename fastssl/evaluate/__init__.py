"""Evaluations of a frozen backbone: one file each, found by module name.

A file of this folder that defines a subclass of `fastssl.evaluate.base.Evaluation` is an evaluation.
"""

from __future__ import annotations

import importlib
import pkgutil

from fastssl.evaluate.base import Evaluation
from loaders.errors import unknown


def available() -> list[str]:
    """Names of the evaluations in this folder, sorted."""
    return sorted(_found())


def load(name: str) -> type[Evaluation]:
    """Evaluation `name`. Raises UserError for an unknown name."""
    found = _found()
    if name not in found:
        raise unknown("evaluation", name, found)
    return found[name]


def _found() -> dict[str, type[Evaluation]]:
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    return {
        name: value
        for name, module in modules.items()
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Evaluation) and value is not Evaluation
        if value.__module__ == module.__name__
    }
