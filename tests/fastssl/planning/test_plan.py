"""--plan and --fit: what they count, choose and print. As a program it compares predictions with short trainings:

    PYTHONPATH=.:tests python tests/fastssl/planning/test_plan.py REPEATS elapsed|cpu [PRESET] --data T.beton [OPTIONS]

elapsed: seconds on the clock, which other programs change. cpu: everything in CPU seconds of this process.
"""

from __future__ import annotations

import io
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import pytest
from rich.console import Console
from small import SMALL, config_of

from fastssl.config import schema as configs
from fastssl.config.command_line import parse
from fastssl.config.schema import RunConfig
from fastssl.planning import bench, tables
from fastssl.planning import plan as plans
from fastssl.planning.bench import Neighbours, timed
from fastssl.planning.cards import CARDS
from fastssl.planning.fit import candidates, most_that_fit, options
from fastssl.planning.forecast import Forecast
from fastssl.planning.schedule import Range, Timings, exactly, parts, steps_by_size, total
from fastssl.planning.tables import spell
from fastssl.train import main
from fastssl.training import checkpoint, trainer
from fastssl.training.monitor import Monitor
from fastssl.training.trainer import train

ONE_THREAD = [*SMALL, "--workers", "1", "--backend", "cpu"]


def config(**values: object) -> RunConfig:
    return configs.replace(config_of("fastsiam"), data="T.beton", **values)


# ------------------------------------------------------------------ counting


def test_steps_stop_where_max_steps_says() -> None:
    assert steps_by_size(config(epochs=7), 10) == {32: 70}
    assert steps_by_size(config(epochs=7, max_steps=25), 10) == {32: 25}
    assert steps_by_size(config(epochs=7, max_steps=99), 10) == {32: 70}


def test_a_size_schedule_has_equal_shares_of_the_epochs() -> None:
    assert steps_by_size(config(epochs=6, size_schedule=(16, 24, 32)), 10) == {16: 20, 24: 20, 32: 20}
    assert steps_by_size(config(epochs=6, size_schedule=(16, 24, 32), max_steps=35), 10) == {16: 20, 24: 15}
    timings = Timings({16: exactly(1), 24: exactly(2), 32: Range(4, 3, 6)}, {16: 1000, 24: 100, 32: 10_000})
    assert total(config(epochs=6, size_schedule=(16, 24, 32)), timings, 10) == Range(11_240, 11_220, 11_280)
    assert total(config(epochs=6, size_schedule=(16, 24, 32), max_steps=35), timings, 10) == exactly(1150)


def test_the_total_is_the_sum_of_what_the_run_does() -> None:
    timings = Timings({32: Range(2, 1, 4)}, {32: 1000}, files=7, checkpoint=100_000, knn=10_000_000)
    run = config(epochs=7, checkpoint_minutes=0, val="V.beton", knn_every=3)
    assert parts(run, timings, 10) == {
        "training": (70, Range(140, 70, 280)),
        "kNN": (4, exactly(40_000_000)),  # before, after epochs 3 and 6, after the last
        "checkpoints": (7, exactly(700_000)),
        "start": (1, exactly(1000)),
        "files": (1, exactly(7)),
    }
    assert total(run, timings, 10) == Range(40_701_147, 40_701_077, 40_701_287)
    assert parts(configs.replace(run, knn_every=0), timings, 10)["kNN"][0] == 2
    assert parts(configs.replace(run, val=None), timings, 10)["kNN"] == (0, exactly(0))
    # 20 s per epoch: one by the clock every 6 s, so three, and the one at the end.
    assert parts(configs.replace(run, checkpoint_minutes=0.1), timings, 10)["checkpoints"][0] == 7 * 4


@pytest.mark.parametrize("more", [{"epochs": 3, "knn_every": 2}, {"epochs": 4, "knn_every": 0, "max_steps": 8}])
def test_a_real_run_does_what_is_counted(
    more: dict, beton: Path, val_beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """48 images, 6 steps per epoch."""
    done = {"checkpoints": 0, "kNN": 0, "training": 0}

    def counted(name: str, function: object) -> object:
        def call(*args: object) -> object:
            done[name] += 1
            return function(*args)

        return call

    monkeypatch.setattr(checkpoint, "save", counted("checkpoints", checkpoint.save))
    monkeypatch.setattr(Monitor, "__call__", counted("kNN", Monitor.__call__))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in more.items()]
    where = ["--data", str(beton), "--val", str(val_beton), "--out", str(tmp_path)]
    run = parse([*ONE_THREAD, *where, "--knn-k=5", "--num-views=2", *flags])
    train(run, Console(quiet=True), counted("training", lambda *_: None))
    found = parts(run, Timings({32: exactly(0.01)}, {32: 0}), 6)
    assert {name: num for name, (num, _) in found.items() if name in done} == done


# ------------------------------------------------------------------ measuring


def test_timed_calls_for_as_long_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    lengths = iter([0.1] + 20 * [0.1] + 20 * [0.3] + 60 * [0.2])

    def do() -> None:
        nonlocal clock
        clock += next(lengths)

    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    seconds = timed(do, lambda: None, 10.0)
    assert (seconds.value, seconds.low, seconds.high) == pytest.approx((0.2, 0.1, 0.3))  # 5 blocks of 20
    assert len(list(lengths)) == 0


def test_timed_does_not_repeat_what_takes_longer_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0

    def do() -> None:
        nonlocal clock
        clock += 30

    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    assert timed(do, lambda: None, 10.0) == exactly(30)
    assert clock == 3 * 30


def test_timed_counts_what_the_device_has_still_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, queued = 0.0, 0

    def do() -> None:
        nonlocal queued
        queued += 1

    def wait() -> None:
        nonlocal clock, queued
        clock, queued = clock + queued, 0

    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    assert timed(do, wait, 20.0) == exactly(1)


def test_neighbours_are_noticed_only_where_they_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    times = [(0, 100, 10), (10, 139, 12)]  # of 40 core seconds 39 busy, 2 of them ours
    monkeypatch.setattr(Neighbours, "_now", staticmethod(lambda: times.pop(0)))
    assert Neighbours().cores() == 3.7
    times = [(0, 100, 10), (10, 130, 12)]
    assert Neighbours().cores() == 0
    times = [None, (10, 130, 12)]
    assert Neighbours().cores() == 0


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc")
def test_the_machine_is_busy_for_at_least_as_long_as_this_program() -> None:
    before, end = Neighbours._now(), time.process_time() + 0.3
    while time.process_time() < end:
        pass
    seconds, everybody, own = (b - a for a, b in zip(before, Neighbours._now(), strict=True))
    assert own >= 0.3 and everybody >= own - 0.1 and everybody <= seconds * os.cpu_count() + 0.1


# ------------------------------------------------------------------ --fit


@pytest.mark.parametrize(("budget", "best"), [(5, 3), (30, 3), (40, 4), (49.9, 4), (50, 5), (1234, 123), (10240, 1024)])
def test_most_that_fit(budget: float, best: int) -> None:
    assert most_that_fit(lambda n: 10 * n, budget, 3) == best


def test_candidates_end_at_the_size_and_get_cheaper() -> None:
    assert candidates(224) == [(160, 224), (128, 160, 224), (128, 128, 224)]
    assert candidates(64) == [(48, 64), (40, 48, 64), (40, 40, 64)]
    assert candidates(32) == [(24, 32), (16, 24, 32), (16, 16, 32)]
    assert candidates(8) == []
    for size in range(9, 400):
        for schedule in candidates(size):
            assert list(schedule) == sorted(schedule) and schedule[-1] == size > schedule[0] >= 8


class Told(Forecast):
    """A plan whose measurements are known: a step takes 1 s and 1 s per view, and in proportion to the pixels."""

    steps_per_epoch = 100

    def __init__(self, config: RunConfig):
        self.config = config
        loop, start = self.loop()
        self.timings = Timings({config.data.size: loop}, {config.data.size: start})

    def loop(self, **changes: int) -> tuple[Range, float]:
        changed = configs.replace(self.config, **changes)
        pixels = (changed.data.size / self.config.data.size) ** 2
        return exactly((1 + changed.method_options.num_views) * pixels), 10


def fits(plan: Forecast, budget: float) -> dict[str, float]:
    return {o.flags: o.seconds.value for o in options(plan, budget)}


def test_fit_offers_the_most_of_each_kind_that_meets_the_budget() -> None:
    plan = Told(config(epochs=10, size=224))  # K = 4: 5 s per step
    found = fits(plan, 4100)
    assert found.pop("(as it is)") == 10 + 10 * 100 * 5
    assert found.pop("--epochs 8") == 10 + 8 * 100 * 5
    assert found.pop("--num-views 3") == pytest.approx(10 + 10 * 100 * 4)
    assert found == {"--size-schedule 160:224": pytest.approx(20 + 500 * 5 * (1 + (160 / 224) ** 2))}


def test_fit_takes_more_epochs_if_there_is_time() -> None:
    plan = Told(config(epochs=10, size=224))
    found = fits(plan, 7600)
    assert found["--epochs 15"] == 10 + 15 * 100 * 5
    assert found["(as it is)"] <= 7600 and found["--num-views 3"] <= 7600


def test_fit_says_the_least_there_is_where_nothing_fits() -> None:
    plan = Told(config(epochs=10, size=224, warmup_epochs=2.5))
    found = fits(plan, 60)
    assert found["--epochs 3"] == 10 + 3 * 100 * 5  # not fewer than warm-up takes
    assert found["--num-views 2"] == 10 + 10 * 100 * 3
    lines = list(tables.fit(plan, 60))
    assert lines[-1].startswith("nothing fits; the best there is takes ") and "--epochs 3" in lines[-1]
    assert len(list(tables.fit(plan, 4100))) == 1
    both = "--num-views 2 --size-schedule 128:128:224"
    assert found[both] == pytest.approx(20 + 0.6 * (found["--size-schedule 128:128:224"] - 20))
    assert found[f"{both} --epochs 3"] < found[both]


def test_hours_are_rounded_to_three_figures() -> None:
    assert spell(Range(37_440, 36_360, 39_240)) == "10.4 h (10.1-10.9)"
    assert spell(exactly(3600 * 0.25)) == "0.25 h"
    assert spell(exactly(90)) == "1.5 min"
    assert spell(Range(4, 3, 6)) == "4 s (3-6)"


# ------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def planned(beton: Path, val_beton: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run of two steps, and what --plan --fit prints of it, which leaves it as it is."""
    out = tmp_path_factory.mktemp("runs") / "one"
    run = [*ONE_THREAD, "--data", str(beton), "--out", str(out), "--epochs", "3"]
    train(parse([*run, "--max-steps", "2"]), Console(quiet=True))
    before = {p: p.read_bytes() for p in out.iterdir()}
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "PART_SECONDS", 0.02)
        patch.setattr(bench, "LOOP_SECONDS", 0.02)
        patch.setattr(plans, "Console", lambda: Console(file=printed))
        more = ["--val", str(val_beton), "--knn-k", "5", "--recalibrate-bn", "8", "--fit", "1e-6"]
        assert main([*run, *more]) == 0
    assert {p: p.read_bytes() for p in out.iterdir()} == before
    assert list(out.parent.iterdir()) == [out]
    return out, printed.getvalue()


def test_plan_prints_everything_with_where_it_is_from(planned: tuple[Path, str]) -> None:
    _, printed = planned
    assert "fastsiam, resnet18, 4 views of 32 px, batch 8, 3 epochs of 6 steps" in printed
    rows = {line.strip().split("  ")[0]: line for line in printed.splitlines()}
    for name in ("loader alone", "decode", "augment", "step alone", "training loop", "training", "start", "in all"):
        assert "measured" in rows[name] or "derived" in rows[name], name
    assert "2 evaluations" in rows["kNN"] and " 3 " in rows["checkpoints"] and "18 steps" in rows["training"]
    for card in CARDS:
        assert rows[card.name].rstrip().endswith("derived")
    assert sum(line.rstrip().endswith("measured") for line in printed.splitlines()) >= 2  # this machine, --fit
    for word in ("limit: ", " memory: ", "of memory free: they fit into it", "nothing is kept"):
        assert word in printed


def test_disk_space_is_that_of_the_real_files(planned: tuple[Path, str]) -> None:
    out, printed = planned
    for name, file in (("checkpoint", "checkpoint.pt"), ("weights", "weights.safetensors")):
        number, unit = re.search(rf"{name} ([0-9.]+) (MB|GB)", printed).groups()
        size = float(number) * {"MB": 1e6, "GB": 1e9}[unit]
        assert size == pytest.approx((out / file).stat().st_size, rel=0.01), name


def test_fit_is_printed_with_flags(planned: tuple[Path, str]) -> None:
    _, printed = planned
    for words in ("within 1e-06 h on this machine", "(as it is)", "--num-views 2", "--epochs 1", "nothing fits"):
        assert words in printed


@pytest.mark.parametrize(("flags", "planning"), [("--plan", True), ("--fit 3", True), ("", False)])
def test_what_asks_for_a_plan(flags: str, planning: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(plans, "run", lambda _: asked.append("plan") or 0)
    monkeypatch.setattr(trainer, "train", lambda _: asked.append("train") or {"stopped": None})
    assert main(["--data", "T.beton", *flags.split()]) == 0
    assert asked == ["plan" if planning else "train"]


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ("--plan", "no training data: give --data"),
        ("--plan --data /nowhere.beton", "/nowhere.beton"),
        ("--fit 0 --data /nowhere.beton", "--fit 0"),
        ("--fit 3 --max-steps 5 --data /nowhere.beton", "leave --max-steps out"),
    ],
)
def test_bad_input_is_one_line(flags: str, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags.split()) == 2
    message = capsys.readouterr().err
    assert what in message and len(message.splitlines()) == 1


def test_plan_under_torchrun_is_refused(
    beton: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["--plan", "--data", str(beton)]) == 2
    assert "without torchrun" in capsys.readouterr().err


# ------------------------------------------------------------------ predict, train, compare


def compare(repeats: int, argv: list[str]) -> None:
    """Print predicted and real seconds of a run, `repeats` times."""
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            run = configs.replace(parse(argv), out=Path(folder) / "run")
            (Path(folder) / "scratch").mkdir()
            plan = Forecast(run, Path(folder) / "scratch")
            start = time.perf_counter()
            result = train(run, Console(quiet=True))
            took, trained = time.perf_counter() - start, 3600 * result["hours"]
        for name, seconds, real in (
            ("whole", plan.seconds(), took),
            ("training", plan.parts()["training"][1], trained),
        ):
            spread = f"{seconds.low:.1f}-{seconds.high:.1f}"
            print(f"{name:8}  predicted {seconds.value:.1f} s ({spread})  real {real:.1f} s", end="  ")
            print(f"predicted/real {seconds.value / real:.3f}", flush=True)


if __name__ == "__main__":
    if sys.argv[2] == "cpu":
        time.perf_counter = time.process_time
    compare(int(sys.argv[1]), sys.argv[3:])
