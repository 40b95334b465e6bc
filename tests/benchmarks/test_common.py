"""benchmarks.common: figures and ratios are what they say, nobody is forgotten, errors come through."""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from benchmarks import common
from benchmarks.common import CommonOptions, Process, Report, Run, chosen, cpu_seconds, figure, interleave, ratio, shown
from benchmarks.contestants import floor, ours
from loaders import UserError


def test_figures_and_ratios() -> None:
    assert figure([3.0, 1.0, 2.0, 9.0]) == {"median": 2.5, "min": 1.0, "max": 9.0, "values": [3.0, 1.0, 2.0, 9.0]}
    assert ratio([2.0, 12.0, 4.0], [1.0, 3.0, 4.0])["values"] == [2.0, 4.0, 1.0]
    # The median of the ratios (2, 4, 1); the ratio of the medians would be 4 / 3.
    assert ratio([2.0, 12.0, 4.0], [1.0, 3.0, 4.0])["median"] == 2.0
    with pytest.raises(ValueError):
        ratio([1.0, 2.0], [1.0])


def test_numbers_for_people() -> None:
    assert [shown(v) for v in (0.012345, 1.0, 12.345, 123.45, 999.7, 12345.6, None, math.nan)] == [
        *("0.0123", "1.00", "12.3", "123", "1,000", "12,346", "-", "-")
    ]
    assert shown(figure([1.0, 2.0, 4.0])) == "2.00"
    assert common.spread(figure([1.0, 2.0, 4.0])) == "1.00-4.00"


def test_rounds_are_interleaved_and_the_first_is_not_counted() -> None:
    calls: list[tuple[str, int]] = []

    def contestant(name: str, number: int) -> Run:
        calls.append((name, number))
        return Run(number, 10 * number)

    names = ("a", "b", "c")
    runs = {name: functools.partial(contestant, name) for name in names}
    measured = interleave(runs, 4)
    assert measured == {name: [Run(n, 10 * n) for n in (1, 2, 3, 4)] for name in names}
    assert [number for _, number in calls] == [n for n in range(5) for _ in names]
    rounds = [tuple(name for name, n in calls if n == number) for number in range(5)]
    assert all(sorted(r) == list(names) for r in rounds) and len(set(rounds)) > 1
    calls.clear()
    assert interleave(runs, 1, warm=True)["b"] == [Run(1, 10)] and len(calls) == 3


def test_only_and_skip(tmp_path: Path) -> None:
    names = ["floor", "cpu", "pil"]
    config = CommonOptions(data=tmp_path)
    assert chosen(names, config) == names
    config.only, config.skip = ("pil", "floor"), ("floor",)
    assert chosen(names, config) == ["pil"]
    config.skip = ("flor",)
    with pytest.raises(UserError, match="unknown contestant 'flor', did you mean 'floor'"):
        chosen(names, config)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [("repeats", 0, "--repeats 0"), ("images", 3, "less than a batch"), ("num_views", (), "--num-views"),
     ("workers", (0,), "--workers"), ("device", "cuda", "no CUDA device"), ("device", "gpu", "give cpu, cuda or auto")],
)  # fmt: skip
def test_options_are_checked(
    tmp_path: Path, field: str, value: object, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = CommonOptions(data=tmp_path)
    config.check()
    assert config.device == "cpu"
    setattr(config, field, value)
    with pytest.raises(UserError, match=says):
        config.check()


def _burn(seconds: float, burnt: multiprocessing.Event, end: multiprocessing.Event) -> None:
    while time.process_time() < seconds:
        pass
    burnt.set()
    end.wait()


def test_cpu_time_includes_children_alive_and_ended() -> None:
    context = multiprocessing.get_context("fork")
    burnt, end = context.Event(), context.Event()
    before = cpu_seconds()
    child = context.Process(target=_burn, args=(0.3, burnt, end))
    child.start()
    burnt.wait()
    alive = cpu_seconds()
    assert alive - before >= 0.3
    end.set()
    child.join()
    # The kernel counts an ended child in ticks of 10 ms; counting it twice would add another 0.3 s.
    assert -0.05 <= cpu_seconds() - alive < 0.25


def test_a_process_says_what_went_wrong(tmp_path: Path) -> None:
    config = CommonOptions(data=tmp_path / "none.beton", images=8, batch_size=8)
    with pytest.raises(UserError, match=r"none\.beton does not exist"):
        Process(floor, config, 1, 1)
    with pytest.raises(UserError, match="no_such_module cannot be imported"):
        Process(floor, config, 1, 1, modules=("no_such_module",))
    with pytest.raises(RuntimeError, match="invalid literal for int"):
        Process(int, "x")


def test_packages_that_are_not_there() -> None:
    assert common.not_installed("json", "pip install it") is None
    for name in ("no_such_package", "no_such_package.part"):
        assert common.not_installed(name, "pip install it") == f"{name} is not installed: pip install it"


def test_a_process_goes_through_rounds(beton: Path) -> None:
    config = CommonOptions(data=beton, images=16, batch_size=8, size=32, device="cpu")
    build = functools.partial(ours, "cpu", "crops")
    with Process(build, config, 2, 1, modules=("json",)) as process:
        assert 0 < process.start.first_batch_s < process.start.start_s
        run = process.run(1)
        assert run.cpu_s > 0 and run.elapsed_s > 0
        assert process.peak_rss_mb > 50
        pid = process._process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_file_says_where_it_was_measured(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    report = Report([{"contestant": "a"}], [], {"b": "not installed"}, {"bytes": 7})
    common.write_json(out, "loader", CommonOptions(data=tmp_path, json=out), report)
    content = json.loads(out.read_text())
    assert content["results"] == [{"contestant": "a"}] and content["skipped"] == {"b": "not installed"}
    assert content["bytes"] == 7 and content["options"]["data"] == str(tmp_path)
    assert content["machine"].keys() >= {"cpu", "cores", "memory_gb", "gpu", "load", "python", "versions", "commit"}
    assert "torch" in content["machine"]["versions"]


def test_the_folder_of_the_file_is_checked_first(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def measure(_config: CommonOptions) -> Report:
        raise AssertionError("measured in vain")

    assert common.main("x", CommonOptions, measure, ["--data", "x", "--json", str(tmp_path / "no" / "x.json")]) == 2
    assert "of --json does not exist" in capsys.readouterr().err
