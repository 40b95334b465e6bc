"""Methods: one file each, found by module name.

A method module defines

    Config      a dataclass: the method's own options, each with its unit and source (they become command-line flags);
                optionally validate(), check_network(backbone, size) and check_batch(images per process), which raise
                UserError
    views       (config, recipe) -> ViewSpec: what the method asks of the loader; recipe(K) gives K large views
    Method      nn.Module, built with (backbone, width, config); it has
                    backbone                   what is trained, evaluated and exported
                    forward(batch)             -> (loss, metrics): a scalar, and detached scalars to log
                    features(batch), loss(*features)  optional, the two halves of forward: the passes of the networks
                                               that see images, and all that follows, which is compiled as one graph
                    separable                  optional bool: the loss is a mean over images that meet in BatchNorm only
                    param_groups()             optional: dicts {"params": [...], "fixed_lr": bool}
                    before_step(progress)      optional, before the forward pass: momentum targets, temperatures
                    after_backward(progress)   optional: drop gradients that the optimiser must not see
                    after_step(progress)       optional: momentum targets that follow the step

A new method is one new file; nothing else names it.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from loaders.errors import unknown


def available() -> list[str]:
    """Names of the methods in this folder, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """The module of method `name`. Raises UserError for an unknown name."""
    if name not in available():
        raise unknown("method", name, available())
    return importlib.import_module(f"{__name__}.{name}")
