"""The choice of the backend: the rule, the measuring, the memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import overwrite, write_beton

import loaders
from loaders import auto
from loaders.auto import Choice, Rate
from loaders.backends import resident
from loaders.beton import Reader

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
OPTIONS = {"batch_size": 4, "device": CPU, "workers": 1}
SPEC = loaders.views.simsiam(2, 24)


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    return Reader(write_beton(tmp_path / "train.beton", 12))


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing fits into memory, and measuring is short."""
    monkeypatch.setattr(resident, "SHARE", 0.0)
    monkeypatch.setattr(auto, "SECONDS", 0.05)


def test_small_data_lives_in_memory_without_measuring(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "measure", None)
    choice = auto.choose(reader, SPEC, **OPTIONS)
    assert choice.backend == "resident" and "12 images decoded are" in choice.why
    assert auto.choose(reader, SPEC, order="sequential", **OPTIONS).backend == "cpu"


@pytest.mark.usefixtures("large")
def test_what_is_measured_is_remembered(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = auto.choose(reader, SPEC, **OPTIONS)
    assert choice.backend in auto.MEASURED and "CPU time per image: cpu " in choice.why
    (entry,) = json.loads(reader.path.with_name("train.auto.json").read_text()).values()
    assert entry["backend"] == choice.backend and entry["rates"]["cpu"]["images_per_s"] > 0
    monkeypatch.setattr(auto, "measure", None)
    again = auto.choose(reader, SPEC, **OPTIONS)
    assert again.backend == choice.backend and again.why.startswith(choice.why) and "train.auto.json" in again.why
    with pytest.raises(TypeError):  # other views are another question
        auto.choose(reader, loaders.views.simsiam(3, 24), **OPTIONS)


@pytest.mark.usefixtures("large")
def test_large_batches_are_decoded_by_the_cpu(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def measure(name: str, *_: object, batch_size: int, **__: object) -> Rate:
        measured.append((name, batch_size))
        return Rate({"cpu": 10, "dali": 20}[name], 1.0)

    monkeypatch.setattr(auto, "measure", measure)
    monkeypatch.setattr(resident, "bytes_free", lambda _device: 10**9)
    options = OPTIONS | {"device": CUDA}
    monkeypatch.setattr(auto, "_key", lambda *_: "this machine")
    assert auto.choose(reader, SPEC, **options).backend == "dali"
    assert measured == [("cpu", 4), ("dali", 4)]
    assert auto.choose(reader, SPEC, **options | {"batch_size": 4096}).backend == "cpu"
    assert measured[2:] == [("cpu", 1024)]
    assert auto.choose(reader, SPEC, **options).backend == "dali"  # remembered apart


@pytest.mark.usefixtures("large")
def test_a_damaged_memory_is_no_memory(reader: Reader) -> None:
    path = reader.path.with_name("train.auto.json")
    for content in ("{", "[1]", '{"x": 1}', '{"x": {"backend": "rm -rf", "why": "?"}}'):
        path.write_text(content)
        assert auto.choose(reader, SPEC, **OPTIONS).backend in auto.MEASURED


@pytest.mark.usefixtures("large")
def test_a_folder_that_cannot_be_written_costs_only_the_memory(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "sidecar_path", lambda *_: Path("/proc/train.auto.json"))
    assert auto.choose(reader, SPEC, **OPTIONS).backend in auto.MEASURED
    assert auto._load(Path("/proc/train.auto.json")) == {}


def test_memory_that_is_gone_is_measured_anew(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "SMALL", 0)
    monkeypatch.setattr(auto, "SECONDS", 0.05)
    assert auto.choose(reader, SPEC, **OPTIONS).backend == "resident"
    monkeypatch.setattr(resident, "bytes_free", lambda _device: 1000)
    assert auto.choose(reader, SPEC, **OPTIONS).backend in auto.MEASURED


@pytest.mark.parametrize(
    ("rates", "device", "fits", "expected"),
    [
        ({"cpu": (900, 2.0), "dali": (800, 3.0)}, CPU, True, "resident"),
        ({"cpu": (900, 2.0), "dali": (1500, 3.0)}, CPU, False, "cpu"),  # the network needs the CPU, too
        ({"cpu": (900, 3.0), "dali": (800, 2.0)}, CPU, False, "dali"),
        ({"cpu": (900, 9.0), "dali": (1000, 1.0)}, CUDA, False, "cpu"),  # not worth the GPU's time
        ({"cpu": (900, 9.0), "dali": (2000, 1.0)}, CUDA, False, "dali"),
        ({"cpu": (900, 9.0)}, CUDA, False, "cpu"),
    ],
)
def test_the_rule(rates: dict, device: torch.device, fits: bool, expected: str) -> None:
    choice = auto._decide({name: Rate(*r) for name, r in rates.items()}, device, "fits", fits)
    assert isinstance(choice, Choice) and choice.backend == expected


def test_a_broken_sample_does_not_stop_the_measuring(reader: Reader) -> None:
    overwrite(reader.path, 3)
    with pytest.warns(UserWarning, match="replaced"):
        rate = auto.measure("cpu", reader, SPEC, seconds=0.05, **OPTIONS)
    assert rate.images_per_s > 0 and rate.cpu_ms > 0


def test_the_loader_says_what_was_chosen(reader: Reader) -> None:
    with loaders.Loader(reader, SPEC, batch_size=4) as loader:
        assert loader.choice.backend == loader.backend.name == "resident"
    with loaders.Loader(reader, SPEC, batch_size=4, backend="cpu") as loader:
        assert loader.choice is None
