"""Named recipes: what a run changes in the defaults, whose recipe it is and which result its source reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastssl.config import schema as configs
from fastssl.config.schema import Config, Model

# Training images.
DATASETS = {"imagenet": 1_281_167, "imagenette": 9_469, "cifar10": 50_000}


@dataclass(frozen=True)
class Preset:
    """One recipe."""

    name: str
    method: str
    values: Mapping[str, Any]
    """Leaf fields of the configuration in which it differs from the defaults of the run and of its method."""
    source: str
    """Paper and section, or whose it is."""
    result: str
    """What the source reports: top-1 on ImageNet or CIFAR-10 unless it says otherwise."""
    num_images: int
    """Images of the training set."""
    rows: Mapping[str, str] = field(default_factory=dict)
    """Other rows of the source's tables: options that make them, and their results."""
    notes: str = ""
    """What is ours, and what differs from the source."""

    def make(self) -> Config:
        """The configuration."""
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
    """The preset METHOD[-VARIANT]-DATASET-EPOCHSep. Method, data set and epochs are in its name; its fields are those
    of `shared` and `values`, of which later ones win."""
    method, *_, dataset, epochs = name.split("-")
    merged: dict[str, Any] = {"epochs": int(epochs.removesuffix("ep"))}
    for part in (*shared, values):
        merged |= part
    return Preset(name, method, merged, source, result, DATASETS[dataset], rows or {}, notes)
