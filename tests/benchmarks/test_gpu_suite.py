"""The suite's own doings: nothing without a GPU; with one, every part in the record, whatever became of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import tyro
from rich.console import Console

from benchmarks import augment, common, e2e, gpu_suite
from benchmarks.contestants import contestants
from benchmarks.gpu_suite import Config, Part
from fastssl.arguments import parse
from loaders.beton import Reader


@pytest.mark.skipif(torch.cuda.is_available(), reason="says nothing on a machine with CUDA")
def test_without_cuda_it_is_one_line_and_status_0(capsys) -> None:
    assert gpu_suite.main([]) == 0
    assert capsys.readouterr().out == "no CUDA device: nothing to do\n"


def test_every_part_is_a_command_with_options_that_exist() -> None:
    for part in gpu_suite.parts(Path("x.beton")):
        module, arguments = part.command[2], list(part.command[3:])
        if module == "benchmarks.e2e":
            config, rest = tyro.cli(e2e.Config, args=arguments, return_unknown_args=True)
            assert parse(rest).data.data == "x.beton" and config.repeats == 3
        elif module != "pytest":
            config_class = {"benchmarks.augment": augment.Config, "benchmarks.loader": common.Config}[module]
            config = tyro.cli(config_class, args=arguments)
            assert config.data == Path("x.beton")
            if module == "benchmarks.loader":
                common.chosen(contestants(), config)


def test_failures_and_time_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = (sys.executable, "-c")
    made = [
        Part("good", (*python, "print('fine')"), 60),
        Part("bad", (*python, "import sys; print('oh'); sys.exit(3)"), 60),
        Part("elsewhere", ("no such command",), 60, missing="DALI is not installed"),
        Part("slow", (*python, "import time; print('here', flush=True); time.sleep(99)"), 3),
    ]
    monkeypatch.setattr(gpu_suite, "LEAST_SECONDS", 2)
    monkeypatch.setattr(gpu_suite, "parts", lambda _data: made)
    about = gpu_suite.machine() | {
        "gpu": {"name": "NVIDIA X 2080", "cuda": "13.0", "capability": "7.5", "memory_gb": 11, "multiprocessors": 68}
    }
    monkeypatch.setattr(gpu_suite, "machine", lambda: about)
    out = tmp_path / "record.md"
    assert gpu_suite.suite(Config(data=Path("x.beton"), out=out, minutes=1), Console(quiet=True)) == 1
    text = out.read_text()
    assert "NVIDIA X 2080" in text and "fine" in text and "oh" in text and "here" in text
    assert "| good | ok |" in text and "| bad | failed with status 3 |" in text and "| slow | stopped after 3 s" in text
    assert "| elsewhere | passed over: DALI is not installed | 0 |" in text
    fine = Config(data=Path("x.beton"), out=tmp_path / "fine.md", only=("good", "elsewhere"))
    assert gpu_suite.suite(fine, Console(quiet=True)) == 0
    gpu_suite.suite(Config(data=Path("x.beton"), out=out, minutes=0.01), Console(quiet=True))
    assert out.read_text().count("not begun: no time left") == 3


def test_the_pictures_have_imagenets_size(tmp_path: Path) -> None:
    gpu_suite.make_pictures(tmp_path / "p.beton", num=4)
    reader = Reader(tmp_path / "p.beton")
    assert len(reader) == 4 and reader.height.tolist() == [375] * 4
    assert 60_000 < reader.size.mean() < 180_000
