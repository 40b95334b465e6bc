"""Several files as one data set."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import jpeg_bytes, overwrite, photo

import loaders
from loaders import UserError
from loaders.beton import Reader, Writer
from loaders.dataset import Readers, open_data

SPEC = loaders.views.simsiam(2, 24)


def part(path: Path, labels: list[int], classes: list[str] | None, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    with Writer(path, len(labels)) as writer:
        for label in labels:
            height, width = rng.integers(30, 60, 2).tolist()
            writer.add(jpeg_bytes(photo(rng, height, width)), height, width, label)
    if classes is not None:
        path.with_suffix(".json").write_text(json.dumps({"classes": classes}))
    return path


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    return [part(tmp_path / f"part-{i:02d}.beton", [0, 1] * (4 + i), ["cat", "dog"], seed=i) for i in range(3)]


def test_samples_follow_one_another(parts: list[Path]) -> None:
    readers = [Reader(p) for p in parts]
    data = open_data(f"{parts[0].parent}/part-{{00..02}}.beton")
    assert isinstance(data, Readers) and len(data) == 8 + 10 + 12 and data.paths == tuple(parts)
    expected = [sample for reader in readers for sample in reader]
    for i, sample in enumerate(expected):
        ours = data[i]
        assert np.array_equal(ours.jpeg, sample.jpeg) and ours[1:] == sample[1:]
        assert (data.height[i], data.width[i], data.label[i]) == sample[1:4]
    assert data.classes == ["cat", "dog"]
    assert np.array_equal(pickle.loads(pickle.dumps(data))[29].jpeg, expected[29].jpeg)


def test_names_of_files(parts: list[Path]) -> None:
    a, b, c = map(str, parts)
    folder = parts[0].parent
    assert isinstance(open_data(a), Reader) and isinstance(open_data(parts[0]), Reader)
    assert open_data(f"{a}, {c}").paths == (parts[0], parts[2])
    assert open_data(f"{folder}/part-{{00,02}}.beton,{b}").paths == (parts[0], parts[2], parts[1])
    with pytest.raises(UserError, match="named twice"):
        open_data(f"{a},{b},{a}")
    with pytest.raises(UserError, match=r"part-03\.beton does not exist"):
        open_data(f"{folder}/part-{{00..03}}.beton")
    with pytest.raises(UserError, match="no data file"):
        open_data(" , ")


def test_labels_mean_the_same_class_in_every_file(tmp_path: Path) -> None:
    part(tmp_path / "a.beton", [0, 1], ["cat", "dog"], 0)
    part(tmp_path / "b.beton", [0, 1, 1], ["ant", "cat"], 1)
    data = open_data(f"{tmp_path}/a.beton,{tmp_path}/b.beton")
    assert data.classes == ["ant", "cat", "dog"]
    assert [data.classes[i] for i in data.label] == ["cat", "dog", "ant", "cat", "cat"]
    assert data[0].label == 1
    part(tmp_path / "c.beton", [0, 1], None, 2)  # no names: labels as stored
    data = open_data(f"{tmp_path}/a.beton,{tmp_path}/c.beton")
    assert data.classes is None and data.label.tolist() == [0, 1, 0, 1]
    part(tmp_path / "d.beton", [5], ["cat"], 3)
    with pytest.raises(UserError, match=r"d\.beton has label 5"):
        open_data(f"{tmp_path}/a.beton,{tmp_path}/d.beton")


@pytest.mark.parametrize("order", ["random", "page", "sequential"])
@pytest.mark.parametrize("backend", ["cpu", "resident"])
def test_they_train_as_one(parts: list[Path], order: str, backend: str) -> None:
    data = f"{parts[0].parent}/part-{{00..02}}.beton"
    seen = {}
    with loaders.open(data, SPEC, batch_size=6, order=order, backend=backend, page_window=1) as loader:
        for batch in loader.epoch(2):
            seen |= {int(i): batch.views[1][row].clone() for row, i in enumerate(batch.index)}
            assert batch.label.tolist() == loader.reader.label[batch.index.numpy()].tolist()
    assert sorted(seen) == list(range(30))
    reader = Reader(parts[0])
    with loaders.Loader(reader, SPEC, batch_size=8, order="sequential") as loader:  # ids of the first file are the same
        (batch,) = loader.epoch(2)
        assert all(torch.equal(view, seen[int(i)]) for view, i in zip(batch.views[1], batch.index, strict=True))


def test_page_numbers_of_different_files_differ(parts: list[Path]) -> None:
    data = open_data(",".join(map(str, parts)))
    pages = np.split(data.page, [8, 18])
    assert [len(np.unique(p)) for p in pages] == [1, 1, 1] and len(np.unique(data.page)) == 3


def test_a_broken_sample_is_named_by_its_file(parts: list[Path]) -> None:
    overwrite(parts[1], 3)
    data = ",".join(map(str, parts))
    with (
        loaders.open(data, SPEC, batch_size=6, backend="cpu") as loader,
        pytest.raises(UserError, match=r"sample 3 of .*part-01\.beton does not decode"),
    ):
        list(loader.epoch())
