"""Named recipes: values that differ from the defaults, their source and its result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastssl.config import schema as configs
from fastssl.config.schema import Model, RunConfig

# Training images.
DATASETS = {"imagenet": 1_281_167, "imagenette": 9_469, "cifar10": 50_000}


@dataclass(frozen=True)
class Preset:
    """A named recipe: its values, its source and the result published there."""

    name: str
    method: str
    values: Mapping[str, Any]
    """Options that differ from the defaults of the run and of the method, by name."""
    source: str
    """Paper and section, or the author of the recipe."""
    result: str
    """Result in the source: top-1 on ImageNet or CIFAR-10 unless it says otherwise."""
    num_images: int
    """Images of the training set."""
    rows: Mapping[str, str] = field(default_factory=dict)
    """Other rows of the source's tables: options that make them, and their results."""
    notes: str = ""
    """Choices of our own, and differences from the source."""

    def make(self) -> RunConfig:
        """The configuration that the recipe describes."""
        config = configs.typed_config(self.method)(model=Model(method=self.method), preset=self.name)
        return configs.replace(config, **self.values)


def preset(
    name: str,
    source: str,
    result: str,
    *shared: Mapping[str, Any],
    rows: Mapping[str, str] | None = None,
    notes: str = "",
    **values: Any,
) -> Preset:
    """The preset METHOD[-VARIANT]-DATASET-EPOCHSep: method, data set and epochs are read from the name, other options
    from `shared` and `values`, of which later ones win."""
    method, *_, dataset, epochs = name.split("-")
    merged: dict[str, Any] = {"epochs": int(epochs.removesuffix("ep"))}
    for part in (*shared, values):
        merged |= part
    return Preset(name, method, merged, source, result, DATASETS[dataset], rows or {}, notes)
