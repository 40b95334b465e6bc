"""Evaluations of a frozen backbone: one file each, found by module name.

An evaluation module defines

    Config    a dataclass: its options (they become flags of `fastssl-eval NAME`)
    run       (task, config) -> {setting: {metric: value}}, with `task` a fastssl.evaluate.task.Task
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from loaders.errors import unknown

_SHARED = {"cli", "features", "task"}  # modules here that are no evaluations


def available() -> list[str]:
    """Names of the evaluations in this folder, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _SHARED)


def load(name: str) -> ModuleType:
    """The module of evaluation `name`. Raises UserError for an unknown name."""
    if name not in available():
        raise unknown("evaluation", name, available())
    return importlib.import_module(f"{__name__}.{name}")
