"""Bytes to views: the .beton file, the converter and the loader. Never imports fastssl.

import loaders
with loaders.open("train.beton", loaders.views.simsiam(K=4, size=224), batch_size=32, device="cuda") as loader:
    for batch in loader.epoch(0):
        batch.views  # 4 tensors [32, 3, 224, 224], normalised, channels last

The names below are imported when they are first used: the converter and the command lines start without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from loaders.errors import UserError

if TYPE_CHECKING:
    from loaders import beton, views
    from loaders.loader import Batch, Loader
    from loaders.loader import Loader as open
    from loaders.views import ViewSpec

__version__ = "0.2.0"  # of the distribution; the only place that states it

__all__ = ["Batch", "Loader", "UserError", "ViewSpec", "__version__", "beton", "open", "views"]

_LAZY = {"Batch": "loader.Batch", "Loader": "loader.Loader", "ViewSpec": "views.ViewSpec", "open": "loader.Loader"}


def __getattr__(name: str) -> object:
    """The public name, imported on first use (PEP 562)."""
    if name in ("beton", "views"):
        return importlib.import_module(f"loaders.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module 'loaders' has no attribute {name!r}")
    module, _, attribute = _LAZY[name].partition(".")
    value = globals()[name] = getattr(importlib.import_module(f"loaders.{module}"), attribute)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
