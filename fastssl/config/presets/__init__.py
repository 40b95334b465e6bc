"""Named recipes, METHOD[-VARIANT]-DATASET-EPOCHS: `fastssl-train NAME --data TRAIN.beton`.

Every file here is a family of recipes, found by listing this folder: its `PRESETS`, and a docstring with their source,
the command, the published result and the cost (the estimate of `fastssl-train --list`, for an RTX 2080 Ti).

A file that is named after a method comes before those that are not. So the first recipe in METHOD.py is what
`--method METHOD` alone begins with.
"""

from __future__ import annotations

import importlib
import pkgutil

from fastssl import methods
from fastssl.config import schema as configs
from fastssl.config.recipe import Preset
from fastssl.config.schema import Model, RunConfig
from loaders.errors import unknown

# What `--method M` alone takes per step, so that it runs on one card: FastSiam's batch.
_SMALL_BATCH = 32


def _families() -> list[str]:
    names, known = [m.name for m in pkgutil.iter_modules(__path__)], methods.available()
    return sorted(names, key=lambda name: (name not in known, name))


PRESETS: dict[str, Preset] = {
    preset.name: preset for family in _families() for preset in importlib.import_module(f"{__name__}.{family}").PRESETS
}


def load(name: str) -> RunConfig:
    """The configuration of preset `name`. Raises UserError for an unknown one."""
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS, listing="fastssl-train --list")
    return PRESETS[name].make()


def first_of(method: str) -> RunConfig:
    """The configuration that `--method METHOD` alone begins with: the method's first preset at 32 images per step, to
    which its rate is scaled; the method's defaults if it has none. Raises UserError for an unknown method."""
    for preset in PRESETS.values():
        if preset.method == method:
            config = configs.replace(preset.make(), batch_size=_SMALL_BATCH)
            config.preset = ""
            return config
    return configs.typed_config(method)(model=Model(method=method))
