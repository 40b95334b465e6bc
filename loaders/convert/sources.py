"""Sources of fastssl-convert: `open_source` turns the SRC argument into a `Source` of labelled images.

A source knows how many images it has, their names, labels and classes before any pixel is read; `read(i)` then returns
the content of one image file. Labels are positions in the sorted class names, so that train and val agree.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from loaders.braces import expand_braces
from loaders.convert import imagenet
from loaders.convert.archives import Container, Member, open_container
from loaders.convert.images import EXTENSIONS, is_image
from loaders.errors import UserError

__all__ = ["FileSource", "ShapesSource", "Source", "TorchvisionSource", "open_source"]

SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing"))
SNIFF = 16  # bytes that tell an image from another file
MAX_NUMBERED_CLASSES = 1 << 20  # above it, integer labels are taken as ids, not as classes


class Source:
    """Labelled images. `classes` is empty where there are no labels (all are then 0).

    ignored: files that are no images. unusable: (name, reason) of images that have no place in the data set.
    `read` is safe from many threads, in any order.
    """

    classes: list[str] = []
    ignored = 0
    unusable: list[tuple[str, str]] = []

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def sizes(self) -> Sequence[int]:
        """Bytes of each file, 0 where not known."""
        return [0] * len(self)

    def name(self, i: int) -> str:
        """Name of image i in the list of skipped files."""
        raise NotImplementedError

    def read(self, i: int, buffer: memoryview | None = None) -> tuple[bytes | memoryview | Image.Image, int]:
        """Content of the image file (or pixels, where there is no file) and label. OSError if it cannot be had.

        buffer: where the content may be put; if it was, what is returned is the beginning of it.
        """
        raise NotImplementedError

    def subset(self, num: int) -> Sequence[int]:
        """`num` ascending indices spread evenly: the first ones would all be of one class."""
        num = min(num, len(self))
        return (np.arange(num) * len(self) // max(1, num)).tolist()

    def close(self) -> None:
        pass


def open_source(
    src: str,
    *,
    subdir: str | None = None,
    devkit: Path | None = None,
    root: Path | None = None,
    seed: int = 0,
    scratch: Path | None = None,
) -> Source:
    """Open SRC: a folder, an archive, shards (`train-{000..146}.tar`), `torchvision:NAME[:SPLIT]`, `shapes[:N]`.

    subdir: only what lies below it. devkit: labels of the ImageNet validation archive. root: where torchvision keeps
    data sets. seed: of generated pictures. scratch: folder on whose disk a compressed tar is unpacked. Raises UserError
    if there is nothing to convert.
    """
    kind, *arguments = src.split(":")
    if kind in ("shapes", "shapes-val"):
        return ShapesSource(src, "val" if kind == "shapes-val" else "train", arguments, seed)
    if kind == "torchvision":
        return TorchvisionSource(src, arguments, root)
    paths = [Path(p).expanduser() for p in expand_braces(src)]
    if len(paths) > 1:
        missing = [p for p in paths if not p.exists()]
        if missing:
            few = ", ".join(p.name for p in missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise UserError(f"{len(missing)} of {len(paths)} shards of {src} are missing: {few}; adjust the range")
    return FileSource(src, paths, subdir, devkit, scratch)


class FileSource(Source):
    """Image files of a folder or of one or more archives.

    Labels come from `.cls` files beside the images (WebDataset), from class folders, or, for the ImageNet
    validation archive, from the development kit; files in no folder have none.
    """

    def __init__(self, title: str, paths: list[Path], subdir: str | None, devkit: Path | None, scratch: Path | None):
        self._title = title
        self._containers = [open_container(path, scratch) for path in paths]
        self._members: list[Member] = []
        self._container_of: list[int] = []
        self._tags: dict[tuple[int, str], str] = {}  # (shard, WebDataset key) -> content of its .cls
        self.unusable = []
        archives = self._list()
        if not self._members:
            hint = f"; it holds archives ({archives[0]}, ...): name one of them" if archives else ""
            raise UserError(f"{title} holds no images ({self.ignored} other files){hint or '; check the path'}")
        if not any(self._tag(i) for i in range(len(self._members))):  # .cls is also a kind of LaTeX file
            self.ignored += len(self._tags)
            self._tags.clear()
        names = self._choose(subdir)
        if self._tags:
            labels = self._webdataset_labels()
        elif imagenet.is_validation(names):
            labels, self.classes = imagenet.validation_labels(names, paths[0], devkit)
        else:
            labels = self._folder_labels(names)
        self._labels = np.asarray(labels, np.int64)
        self._drop(np.flatnonzero(self._labels < 0))

    def __len__(self) -> int:
        return len(self._members)

    @property
    def sizes(self) -> Sequence[int]:
        return [member.size for member in self._members]

    def name(self, i: int) -> str:
        return self._full_name(self._container_of[i], self._members[i].path)

    def read(self, i: int, buffer: memoryview | None = None) -> tuple[bytes | memoryview, int]:
        container = self._containers[self._container_of[i]]
        return container.read(self._members[i], buffer=buffer), int(self._labels[i])

    def close(self) -> None:
        for container in self._containers:
            container.close()

    def _full_name(self, container: int, path: str) -> str:
        return path if len(self._containers) == 1 else f"{self._containers[container].path.name}/{path}"

    def _list(self) -> list[str]:
        """Fill `_members` with the images and `_tags` with WebDataset labels; returns names of inner archives."""
        archives: list[str] = []
        for number, container in enumerate(self._containers):
            for member in container.list():
                suffix = _suffix(member.path)
                if suffix == ".cls":
                    self._tags[number, _key(member.path)] = _text(container, member)
                elif suffix in EXTENSIONS or _sniffed(container, member):
                    self._members.append(member)
                    self._container_of.append(number)
                else:
                    self.ignored += 1
                    if suffix in (".tar", ".zip", ".tgz", ".gz"):
                        archives.append(member.path)
        return archives

    def _choose(self, subdir: str | None) -> list[str]:
        """Keep what lies below `subdir`; returns the paths that decide about labels, without common top folders."""
        names = [member.path for member in self._members]
        if subdir is None:
            return names if self._tags else _without_top(names)
        prefix = subdir.strip("/") + "/"
        for candidates in (names, _without_top(names)):
            chosen = [i for i, name in enumerate(candidates) if name.startswith(prefix)]
            if chosen:
                self._members = [self._members[i] for i in chosen]
                self._container_of = [self._container_of[i] for i in chosen]
                return _without_top([candidates[i][len(prefix) :] for i in chosen])
        tops = sorted({name.split("/")[0] for name in candidates if "/" in name})
        raise UserError(f"{self._title} has no folder '{subdir}' with images; it has {_few(tops) or 'no folders'}")

    def _folder_labels(self, names: list[str]) -> list[int]:
        """The first folder of each path names the class; sets `classes`. -1: an image outside of all classes."""
        classes = sorted({top for top in map(_top, names) if top is not None})
        splits = [name for name in classes if name.lower() in SPLITS]
        if len(splits) > 1:
            raise UserError(
                f"{self._title} holds {' and '.join(splits)}, and one .beton is one of them; "
                f"choose it: --subdir {splits[0]}"
            )
        if not classes:
            return [0] * len(names)
        self.classes = classes
        label_of: dict[str | None, int] = {None: -1} | {name: i for i, name in enumerate(classes)}
        labels = [label_of[_top(name)] for name in names]
        beside = "lies beside the class folders, so it has no class"
        self.unusable += [(self.name(i), beside) for i, label in enumerate(labels) if label < 0]
        return labels

    def _tag(self, i: int) -> str | None:
        """Content of the .cls file beside image i."""
        return self._tags.get((self._container_of[i], _key(self._members[i].path)))

    def _webdataset_labels(self) -> list[int]:
        """Labels from `key.cls`: numbers are labels, anything else names of classes. -1: none; sets `classes`."""
        tags = [self._tag(i) for i in range(len(self._members))]
        self.unusable += [(self.name(i), "has no .cls beside it") for i, tag in enumerate(tags) if tag is None]
        known = {tag for tag in tags if tag is not None}
        if all(re.fullmatch(r"\d{1,18}", tag) for tag in known):
            num_classes = max(map(int, known)) + 1
            self.classes = [str(i) for i in range(num_classes)] if num_classes <= MAX_NUMBERED_CLASSES else []
            return [-1 if tag is None else int(tag) for tag in tags]
        self.classes = sorted(known)
        label_of = {name: i for i, name in enumerate(self.classes)}
        return [-1 if tag is None else label_of[tag] for tag in tags]

    def _drop(self, unplaced: np.ndarray) -> None:
        """Forget the images without a place; they are in `unusable`."""
        if len(unplaced):
            keep = np.setdiff1d(np.arange(len(self._members)), unplaced)
            self._members = [self._members[i] for i in keep]
            self._container_of = [self._container_of[i] for i in keep]
            self._labels = self._labels[keep]


def _suffix(path: str) -> str:
    name = path.rsplit("/", 1)[-1]
    return "." + name.rsplit(".", 1)[1].lower() if "." in name else ""


def _key(path: str) -> str:
    """Key of a WebDataset sample: its files share their path up to the first dot of the name."""
    folder, _, name = path.rpartition("/")
    return f"{folder}/{name.split('.', 1)[0]}"


def _text(container: Container, member: Member) -> str:
    return bytes(container.read(member, 1024)).decode("utf-8", "replace").strip()


def _sniffed(container: Container, member: Member) -> bool:
    """Say if a file that is not called an image is one."""
    try:
        return member.size > SNIFF and is_image(bytes(container.read(member, SNIFF)))
    except OSError:
        return False


def _without_top(names: list[str]) -> list[str]:
    """Drop leading folders that all paths share, as long as a folder, the class, is left in each."""
    cut = 0
    while (end := names[0].find("/", cut) + 1) and all(
        name.startswith(names[0][:end]) and name.find("/", end) >= 0 for name in names
    ):
        cut = end
    return [name[cut:] for name in names] if cut else names


def _top(name: str) -> str | None:
    """The first folder of a path, None for a file in no folder."""
    return name.split("/", 1)[0] if "/" in name else None


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")


class ShapesSource(Source):
    """Generated pictures (`loaders.convert.shapes`), for a first run without any data."""

    def __init__(self, title: str, split: str, arguments: list[str], seed: int):
        from loaders.convert import shapes

        self._render, self._split, self._seed = shapes.render, split, seed
        self._num = shapes.DEFAULT_NUM[split]
        self.classes = list(shapes.CLASSES)
        if arguments:
            if len(arguments) > 1 or not arguments[0].isdecimal() or int(arguments[0]) < 1:
                raise UserError(f"{title}: write a number of pictures behind the colon, such as shapes:5000")
            self._num = int(arguments[0])

    def __len__(self) -> int:
        return self._num

    def name(self, i: int) -> str:
        return f"{self._split} {i}"

    def read(self, i: int, buffer: memoryview | None = None) -> tuple[bytes, int]:
        del buffer  # the encoder has its own
        return self._render(i, seed=self._seed, split=self._split)

    def subset(self, num: int) -> Sequence[int]:
        return range(min(num, self._num))  # classes alternate: a stride could hit one of them only


class TorchvisionSource(Source):
    """A classification set of `torchvision.datasets`, `torchvision:NAME[:SPLIT]`; downloaded if it is not there.

    Where the set keeps image files and their labels in lists, the files' bytes are read; else its pixels.
    """

    def __init__(self, title: str, arguments: list[str], root: Path | None):
        from loaders.convert import torchvision_sets

        name = torchvision_sets.find(arguments[0] if arguments else "", title)
        self._title = title
        self._data = torchvision_sets.build(name, ":".join(arguments[1:]) or None, root, title)
        torchvision_sets.check(self._data, title)
        self._files = torchvision_sets.files_and_labels(self._data)
        self.classes = torchvision_sets.classes(self._data)
        self._lock = threading.Lock()  # nothing says that a data set may be indexed from two threads

    def __len__(self) -> int:
        return len(self._data)

    def name(self, i: int) -> str:
        return str(self._files[i][0]) if self._files else f"{self._title} {i}"

    def read(self, i: int, buffer: memoryview | None = None) -> tuple[bytes | Image.Image, int]:
        del buffer
        if self._files:
            path, label = self._files[i]
            return Path(path).read_bytes(), int(label)
        with self._lock:
            image, label = self._data[i]
        return image, int(label)
