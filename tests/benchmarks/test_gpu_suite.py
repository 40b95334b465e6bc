"""The suite's own doings: nothing without a GPU; with one, every part in the record, whatever became of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import tyro
from rich.console import Console

from benchmarks import augment, common, e2e, gpu_suite, step
from benchmarks.contestants import contestants
from benchmarks.gpu_suite import Outcome, Part, SuiteOptions
from fastssl.config.command_line import parse
from loaders.beton import Reader
from loaders.errors import UserError


@pytest.mark.skipif(torch.cuda.is_available(), reason="says nothing on a machine with CUDA")
def test_without_cuda_it_is_one_line_and_status_0(capsys) -> None:
    assert gpu_suite.main([]) == 0
    assert capsys.readouterr().out == "no CUDA device: nothing to do\n"


def test_every_part_is_a_command_with_options_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "pick_device", lambda _name: torch.device("cuda"))
    made = gpu_suite.parts(Path("x.beton"), (Path("t.beton"), Path("v.beton")))
    assert len({p.name for p in made}) == len(made)
    for part in made:
        module, arguments = part.command[2], list(part.command[3:])
        if module == "benchmarks.e2e":
            config, rest = tyro.cli(e2e.EndToEndOptions, args=arguments, return_unknown_args=True)
            config.check()
            assert parse(rest).data.data == "x.beton" and config.repeats == 3
        elif module == "benchmarks.step":
            config = tyro.cli(step.StepOptions, args=arguments)
            config.check()
            assert config.data == Path("x.beton")
            names = common.chosen((*step.VARIANTS, *step.PEERS, *step.RATES), config)
            assert "compiled" in names
        elif module == "fastssl.train":
            config = parse(arguments)
            assert config.preset == "fastsiam-cifar10-200ep" and config.data.val.endswith("v.beton")
            assert (config.optim.epochs, config.data.batch_size, config.model.backbone) == (200, 128, "resnet18-cifar")
        elif module != "pytest":
            options = {"benchmarks.augment": augment.AugmentOptions, "benchmarks.loader": common.CommonOptions}
            config = tyro.cli(options[module], args=arguments)
            assert config.data == Path("x.beton")
            if module == "benchmarks.loader":
                common.chosen(contestants(), config)
    assert [p.name for p in made if p.own_time] == ["cifar"]
    assert "cifar" not in {p.name for p in gpu_suite.parts(Path("x.beton"))}


def test_failures_and_time_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = (sys.executable, "-c")
    made = [
        Part("good", (*python, "print('fine'); print('aim: x: 1.31, wanted >= 1.3: pass')"), 60),
        Part("bad", (*python, "import sys; print('oh'); print('aim: y: 1, wanted >= 2: FAIL'); sys.exit(3)"), 60),
        Part("elsewhere", ("no such command",), 60, missing="DALI is not installed"),
        Part("slow", (*python, "import time; print('here', flush=True); time.sleep(99)"), 3),
        Part("long", (*python, "print('all the time')"), 60, own_time=True),
    ]
    monkeypatch.setattr(gpu_suite, "LEAST_SECONDS", 2)
    monkeypatch.setattr(gpu_suite, "parts", lambda *_: made)
    about = gpu_suite.machine() | {
        "gpu": {"name": "NVIDIA X 2080", "cuda": "13.0", "capability": "7.5", "memory_gb": 11, "multiprocessors": 68}
    }
    monkeypatch.setattr(gpu_suite, "machine", lambda: about)
    out = tmp_path / "record.md"
    assert gpu_suite.suite(SuiteOptions(data=Path("x.beton"), out=out, minutes=1), Console(quiet=True)) == 1
    text = out.read_text()
    assert "NVIDIA X 2080" in text and "fine" in text and "oh" in text and "here" in text
    assert "| good | ok |" in text and "| bad | failed with status 3 |" in text and "| slow | stopped after 3 s" in text
    assert "- good: x: 1.31, wanted >= 1.3: pass\n- bad: y: 1, wanted >= 2: FAIL\n\n| part |" in text
    assert "| elsewhere | passed over: DALI is not installed | 0 |" in text
    fine = SuiteOptions(data=Path("x.beton"), out=tmp_path / "fine.md", only=("good", "elsewhere"))
    assert gpu_suite.suite(fine, Console(quiet=True)) == 0
    gpu_suite.suite(SuiteOptions(data=Path("x.beton"), out=out, minutes=0.01), Console(quiet=True))
    assert out.read_text().count("not begun: no time left") == 3
    assert "| long | ok |" in out.read_text()
    with pytest.raises(UserError, match=r"godo.*good"):
        gpu_suite.suite(SuiteOptions(data=Path("x.beton"), out=out, only=("godo",)), Console(quiet=True))


def test_a_stopped_part_leaves_no_process_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "LEAST_SECONDS", 1.0)
    left = tmp_path / "pid"
    helper = f"sleep 60 >/dev/null 2>&1 & echo $! > {left}; wait"
    outcome = gpu_suite.run(Part("slow", ("bash", "-c", helper), 60), 1.0)
    assert outcome.status.startswith("stopped") and not outcome.fine
    stat = Path(f"/proc/{left.read_text().strip()}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


def test_what_cifar_came_to(tmp_path: Path) -> None:
    lines = [{"step": 1, "knn": 30.0}, {"step": 2, "seconds": 540.0}]
    lines += [{"step": 3, "knn": 90.7}, {"step": 3, "knn": 90.5}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    aims = [f"aim: {text}" for text in Outcome(None, "ok", 0, "\n".join(gpu_suite.cifar_aims(tmp_path))).aims]
    assert aims == gpu_suite.cifar_aims(tmp_path)
    assert "90.7, wanted >= 90.6: pass" in aims[0] and "9.00, wanted <= 10: pass" in aims[1]


def test_the_pictures_have_imagenets_size(tmp_path: Path) -> None:
    gpu_suite.make_pictures(tmp_path / "p.beton", num=4)
    reader = Reader(tmp_path / "p.beton")
    assert len(reader) == 4 and reader.height.tolist() == [375] * 4
    assert 60_000 < reader.size.mean() < 180_000
