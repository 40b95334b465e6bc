"""Labels of the ImageNet 2012 validation images, which come in one flat archive: they are in the development kit.

The kit numbers its classes in an order of its own. Here a label is the position of the WordNet id among the sorted ids,
which is what the class folders (or class archives) of the training images give too.
"""

from __future__ import annotations

import io
import re
import tarfile
import zlib
from pathlib import Path

import numpy as np

from loaders.errors import UserError

__all__ = ["is_validation", "validation_labels"]

KIT = "ILSVRC2012_devkit_t12"
_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG", re.IGNORECASE)


def is_validation(names: list[str]) -> bool:
    """Say if these are the images as published: no class folders, only official names."""
    return all(_NAME.fullmatch(name) for name in names)


def validation_labels(names: list[str], source: Path, devkit: Path | None) -> tuple[list[int], list[str]]:
    """Labels of the images and the sorted WordNet ids. The kit lies beside `source` unless `devkit` says where."""
    places = [devkit] if devkit else [source.parent / f"{KIT}.tar.gz", source.parent / KIT]
    kit = next((place for place in places if place.exists()), None)
    if kit is None:
        raise UserError(
            f"{source} holds the ImageNet validation images, whose labels are in {KIT}.tar.gz; "
            + (f"{devkit} does not exist" if devkit else "put that beside it or name it with --devkit")
        )
    truth, meta = (_kit_file(kit, name) for name in ("ILSVRC2012_validation_ground_truth.txt", "meta.mat"))
    wnid_of = _wnids(meta, kit)
    classes = sorted(wnid_of.values())
    label_of = {number: classes.index(wnid) for number, wnid in wnid_of.items()}
    try:
        labels = [label_of[int(line)] for line in truth.split()]
        return [labels[int(found[1]) - 1] for found in map(_NAME.fullmatch, names) if found], classes
    except (KeyError, ValueError, IndexError) as e:
        raise UserError(f"{kit} does not fit the validation images ({e!r}); take {KIT}.tar.gz as published") from None


def _kit_file(kit: Path, name: str) -> bytes:
    """One file of the kit's data folder; the kit may be the archive or unpacked."""
    try:
        if kit.is_dir():
            found = next((p for p in (kit / "data" / name, kit / name) if p.exists()), None)
            content = found.read_bytes() if found else None
        else:
            with tarfile.open(kit) as tar:
                info = next((m for m in tar if m.isreg() and m.name.rsplit("/", 1)[-1] == name), None)
                member = tar.extractfile(info) if info else None
                content = member.read() if member else None
    except (OSError, EOFError, tarfile.TarError, zlib.error) as e:
        raise UserError(f"{kit} cannot be read ({e}); take {KIT}.tar.gz as published") from None
    if content is None:
        raise UserError(f"{kit} has no {name} in it; take {KIT}.tar.gz as published")
    return content


def _wnids(meta: bytes, kit: Path) -> dict[int, str]:
    """WordNet id of each class by ILSVRC2012_ID; the table also lists the groups above the classes."""
    from scipy.io import loadmat

    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
        leaves = synsets if "num_children" not in (synsets.dtype.names or ()) else synsets[synsets["num_children"] == 0]
        return {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in leaves}
    except Exception as e:  # scipy raises whatever the damage leads to
        raise UserError(f"meta.mat of {kit} cannot be read ({e}); take {KIT}.tar.gz as published") from None
