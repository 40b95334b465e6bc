"""torchvision's data sets by name: find the class, build it (download if need be), and get at its image files."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from PIL import Image
from torchvision import datasets

from loaders.errors import UserError

__all__ = ["build", "check", "classes", "files_and_labels", "find"]

DEFAULT_ROOT = Path("~/.cache/fastssl/torchvision")
_BASES = {"DatasetFolder", "ImageFolder", "VisionDataset", "FakeData"}  # not data sets with a name
_TRAIN_WORDS = {"train": True, "test": False, "val": False}


def _names() -> list[str]:
    return sorted(
        name
        for name in datasets.__all__
        if name not in _BASES and {"train", "split"} & set(inspect.signature(getattr(datasets, name)).parameters)
    )


def find(name: str, title: str) -> str:
    """Name of torchvision's class, found whatever the capitals. Raises UserError with the nearest names."""
    by_lower = {known.lower(): known for known in _names()}
    if name.lower() in by_lower:
        return by_lower[name.lower()]
    near = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
    meant = f"did you mean {' or '.join(by_lower[n] for n in near)}?" if near else f"known: {', '.join(_names())}"
    raise UserError(f"{title}: torchvision has no data set '{name}' with train and test images; {meant}")


def build(name: str, split: str | None, root: Path | None, title: str) -> Any:
    """An instance of the data set; `split` is what its constructor calls train= or split=."""
    root = (root or DEFAULT_ROOT).expanduser()
    dataset_class = getattr(datasets, name)
    parameters = inspect.signature(dataset_class).parameters
    options: dict[str, Any] = {}
    if "train" in parameters:
        if (split or "train") not in _TRAIN_WORDS:
            raise UserError(f"{title}: {name} has the splits train and test, not '{split}'")
        options["train"] = _TRAIN_WORDS[split or "train"]
    elif split is not None:
        options["split"] = split
    try:
        root.mkdir(parents=True, exist_ok=True)
        # What it says while unpacking would run into the progress bar.
        with contextlib.redirect_stdout(None):
            if "download" not in parameters:
                return dataset_class(root, **options)
            try:
                return dataset_class(root, **options, download=False)
            except (RuntimeError, OSError):  # not there yet
                return dataset_class(root, **options, download=True)
    except ValueError as e:  # an unknown split: torchvision lists the known ones
        raise UserError(f"{title}: {' '.join(str(e).split())}") from None
    except (RuntimeError, OSError, ImportError) as e:
        raise UserError(
            f"{title} is not in {root} and could not be fetched ({' '.join(str(e).split())}); put the files there "
            "yourself, or name another folder with --root"
        ) from None


def check(data: Any, title: str) -> None:
    """Raise UserError unless the data set is a non-empty list of (picture, class number)."""
    if len(data) == 0:
        raise UserError(f"{title} is empty; choose another split")
    sample = data[0]
    if not (len(sample) == 2 and isinstance(sample[0], Image.Image) and isinstance(sample[1], (int, np.integer))):
        raise UserError(f"{title} is not a classification set (one picture, one class); convert its folder instead")


def files_and_labels(data: Any) -> Sequence[tuple[str | os.PathLike, int]] | None:
    """(path, label) of every image if the data set keeps such lists, in the order of its index; else None."""
    for attribute in ("samples", "_samples", "imgs"):
        pairs = getattr(data, attribute, None)
        if _is_list(pairs, len(data)) and _is_pair(pairs[0]) and _is_file(pairs[0][0]):
            return pairs
    for attribute in ("_image_files", "_images"):
        files = getattr(data, attribute, None)
        if not (_is_list(files, len(data)) and _is_file(files[0])):
            continue
        for label_attribute in ("_labels", "targets", "labels"):
            labels = getattr(data, label_attribute, None)
            if _is_list(labels, len(data)) and labels[0] == data[0][1]:
                return list(zip(files, labels, strict=True))
    return None


def classes(data: Any) -> list[str]:
    """Names of the classes as far as the data set knows them; of several synonyms (ImageNet) the first."""
    names = getattr(data, "classes", None) or []
    return [name if isinstance(name, str) else str(name[0]) for name in names]


def _is_list(value: Any, length: int) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, (list, tuple)) and len(value) == length > 0


def _is_pair(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and isinstance(value[1], int)


def _is_file(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike)) and os.path.isfile(value)
