"""One or several .beton files as one data set.

open_data("train.beton")   open_data("a.beton,b.beton")   open_data("part-{00..15}.beton")
"""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from loaders.beton import Reader, Sample
from loaders.braces import expand_list
from loaders.errors import UserError


class Readers:
    """Several files, one after another: what `Reader` offers, over all of them.

    Sample ids run through the files in the given order. Where every file has class names beside it, labels are
    renumbered to one sorted list of all names; else the stored labels are used.
    """

    def __init__(self, readers: Sequence[Reader]):
        self.readers = tuple(readers)
        self.paths = tuple(path for r in self.readers for path in r.paths)
        self.path = f"{self.paths[0]} ... {self.paths[-1]}"
        self._starts = [0, *itertools.accumulate(map(len, self.readers))]
        self.height = np.concatenate([r.height for r in self.readers])
        self.width = np.concatenate([r.width for r in self.readers])
        self.mode = np.concatenate([r.mode for r in self.readers])
        self.size = np.concatenate([r.size for r in self.readers])
        self.classes, self.label = _common_labels(self.readers)

    @property
    def page(self) -> np.ndarray:
        """Page of each sample [N], numbered through all files."""
        pages, first = [], 0
        for reader in self.readers:
            page = reader.page
            pages.append(page + first)
            first += int(page.max()) + 1
        return np.concatenate(pages)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Sample:
        reader, number = self._find(index)
        return reader[number]._replace(label=int(self.label[index]))

    def _find(self, index: int) -> tuple[Reader, int]:
        file = bisect.bisect_right(self._starts, index) - 1
        return self.readers[file], index - self._starts[file]

    def locate(self, index: int) -> tuple[Path, int]:
        """The file that holds a sample and its number there."""
        reader, number = self._find(index)
        return reader.path, number

    def will_need(self, index_B: np.ndarray, *, whole_pages: bool = False) -> None:
        """Ask the system to read these blobs ahead, as `Reader.will_need` does."""
        file_B = np.searchsorted(self._starts, index_B, side="right") - 1
        for file in np.unique(file_B):
            self.readers[file].will_need(index_B[file_B == file] - self._starts[file], whole_pages=whole_pages)

    def close(self) -> None:
        """Close all files."""
        for reader in self.readers:
            reader.close()

    def __enter__(self) -> Readers:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[Readers], tuple[tuple[Reader, ...]]]:
        return Readers, (self.readers,)

    def __repr__(self) -> str:
        return f"Readers({len(self.readers)} files, {len(self)} samples)"


def _common_labels(readers: Sequence[Reader]) -> tuple[list[str] | None, np.ndarray]:
    """One list of class names and the labels in it; (None, labels as stored) where a file has no names."""
    tables = [t for t in (r.classes for r in readers) if t is not None]
    if len(tables) < len(readers):
        return None, np.concatenate([r.label for r in readers])
    classes = tables[0] if all(t == tables[0] for t in tables) else sorted(set().union(*tables))
    number = {name: i for i, name in enumerate(classes)}
    labels = []
    for reader, table in zip(readers, tables, strict=True):
        if int(reader.label.min()) < 0 or int(reader.label.max()) >= len(table):
            raise UserError(
                f"{reader.path} has label {int(reader.label.max())}, and its .json names {len(table)} classes"
            )
        labels.append(np.array([number[name] for name in table], dtype=np.int64)[reader.label])
    return classes, np.concatenate(labels)


Dataset = Reader | Readers


def open_data(data: str | os.PathLike) -> Dataset:
    """The files that `data` names: one path, several with commas between them, braces as in `part-{00..15}.beton`.

    Raises UserError for files that cannot be used, and for one that is named twice.
    """
    data = os.fspath(data)
    if Path(data).exists():
        return Reader(data)
    paths = expand_list(data)
    if not paths:
        raise UserError("no data file is named: give a .beton")
    twice = {p for p in paths if paths.count(p) > 1}
    if twice:
        raise UserError(f"{min(twice)} is named twice in {data}: its images would be seen twice per epoch")
    readers = [Reader(p) for p in paths]
    return readers[0] if len(readers) == 1 else Readers(readers)
