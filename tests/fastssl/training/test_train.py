"""fastssl-train: a run from start to end, exact resume, and bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from conftest import overwrite, write_beton
from PIL import Image
from safetensors.torch import load_file
from small import SMALL, forbid_waiting, losses

from fastssl import methods
from fastssl.config import schema as configs
from fastssl.progress import Progress
from fastssl.train import main
from fastssl.training import log as logs
from fastssl.training.step import Step
from loaders import Batch

ROOT = Path(__file__).parents[3]
FLAGS = [*SMALL, "--epochs", "2", "--log-every", "1"]


def train(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def small_run(beton: Path, folder: Path, *more: object) -> int:
    return train("--data", beton, "--out", folder, *FLAGS, *more)


@pytest.fixture(scope="module")
def finished(beton: Path, val_beton: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with the kNN monitor."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert small_run(beton, folder, "--val", val_beton, "--knn-k", "5", "--knn-every", "1") == 0
    return folder


def test_a_run_folder_holds_what_is_promised(finished: Path) -> None:
    assert {p.name for p in finished.iterdir()} == {
        "config.yaml", "metrics.jsonl", "checkpoint.pt", "weights.safetensors", "views.png", "curves.png",
    }  # fmt: skip
    entries = logs.read_metrics(finished / logs.METRICS)
    steps = [e for e in entries if "loss" in e]
    assert [e["step"] for e in steps] == list(range(1, 13))
    fields = {"epoch", "loss", "lr", "feature_std", "images_per_s", "views_per_s", "wait_share", "seconds"}
    assert fields <= steps[0].keys()
    assert [e["epoch"] for e in entries if "knn" in e] == [0, 1, 2]
    assert all(0 <= e["knn"] <= e["knn_top5"] <= 100 for e in entries if "knn" in e)
    assert yaml.safe_load((finished / "config.yaml").read_text())["model"]["method"] == "fastsiam"
    # Eight images in four views, 32 px shown three times as large.
    assert Image.open(finished / "views.png").size == (4 * (96 + 4) + 4, 8 * (96 + 4) + 4)


def test_weights_load_strictly_into_torchvision_and_timm(finished: Path) -> None:
    import timm

    state = load_file(finished / "weights.safetensors")
    checkpoint = torch.load(finished / "checkpoint.pt", weights_only=True)["method"]
    assert all(torch.equal(v, checkpoint[f"backbone.{k}"]) for k, v in state.items())
    reference, model = torchvision.models.resnet18(), timm.create_model("resnet18", num_classes=0)
    reference.fc = torch.nn.Identity()
    for net in (reference, model):
        net.load_state_dict(state, strict=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), reference.eval()(x))


def test_resume_keeps_the_number_of_threads(beton: Path, tmp_path: Path) -> None:
    """It decides how sums are split, so a run that goes on elsewhere goes on with the number it began with."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert small_run(beton, tmp_path / "one", "--max-steps", "4") == 0
        assert small_run(beton, tmp_path / "two", "--max-steps", "2") == 0
        torch.set_num_threads(2)
        assert train("--out", tmp_path / "two", "--resume", "--max-steps", "4") == 0
    finally:
        torch.set_num_threads(before)
    assert losses(tmp_path / "two") == losses(tmp_path / "one")


def test_resume_gives_the_same_losses_to_the_last_bit(
    beton: Path, val_beton: Path, finished: Path, tmp_path: Path
) -> None:
    """Stopped in mid-epoch, continued, stopped again at an epoch's end, continued."""
    folder = tmp_path / "run"
    monitor = ("--val", val_beton, "--knn-k", "5", "--knn-every", "1")
    assert small_run(beton, folder, *monitor, "--max-steps", "4") == 0
    assert train("--out", folder, "--resume", "--max-steps", "6") == 0
    assert sorted(losses(folder)) == list(range(1, 7))
    assert train("--out", folder, "--resume", "--max-steps", "12") == 0
    assert losses(folder) == losses(finished)
    a, b = load_file(folder / "weights.safetensors"), load_file(finished / "weights.safetensors")
    assert all(torch.equal(a[k], b[k]) for k in a)


def spawn(beton: Path, folder: Path, *more: object) -> subprocess.Popen:
    """A run in a process of its own, with as many threads as this one (losses depend on their number)."""
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "fastssl.train", "--data", beton, "--out", folder, *FLAGS, *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, **pipes)


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "nothing happened in two minutes"
        time.sleep(0.05)


@pytest.mark.slow
def test_kill_9_at_any_step_loses_nothing(beton: Path, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    # 0.00001 minutes: a checkpoint after every step, so that kills fall into its writing, too.
    process = spawn(beton, folder, "--checkpoint-minutes", "0.00001")
    for kills in range(3):
        wait_for(lambda seen=2 * kills + 2: max(losses(folder), default=0) > seen, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process = spawn(beton, folder, "--resume")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    # The monitor changes no step, so the run without it has the same losses as the one with it.
    assert losses(folder) == losses(finished)


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(beton: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = spawn(beton, folder, "--epochs", "200")
    wait_for(lambda: max(losses(folder), default=0) >= 2, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"fastssl-train --out {folder} --resume" in output
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == max(losses(folder))
    assert not (folder / "weights.safetensors").exists()


# ------------------------------------------------------------------ bad input


def one_line(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """Run, expect status 2 and exactly one line on stderr, and return it."""
    assert train(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastssl-train: error: ") and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-preset"], "unknown preset 'no-such-preset'"),
        (["fastsiam-imagenet-25"], "did you mean 'fastsiam-imagenet-25ep'"),
        ([], "give --data"),
        (["--data", "/nowhere/x.beton"], "/nowhere/x.beton"),
        (["--data", "DATA", "--method", "fastsim"], "did you mean 'fastsiam'"),
        (["--data", "DATA", "--backbone", "resnet81"], "did you mean 'resnet18'"),
        (["--data", "DATA", "--backend", "dally", *FLAGS], "unknown backend 'dally'"),
        (["--data", "DATA", *FLAGS, "--size", "16"], "needs at least 32 px"),
        (["--data", "DATA", *FLAGS, "--batch-size", "64"], "use --batch-size 48 or less"),
        (["--data", "DATA", *FLAGS, "--num-views", "1"], "--num-views 1: at least 2"),
        (["--data", "DATA", *FLAGS, "--val", "/nowhere/v.beton"], "/nowhere/v.beton"),
        (["--data", "DATA", *FLAGS, "--epochs", "0"], "--epochs 0"),
        (["--data", "DATA", *FLAGS, "--crop-min", "1.5"], "--crop-min 1.5"),
        (["--data", "DATA", *FLAGS, "--resume", "--overwrite"], "--resume"),
        (["--resume"], "say which run with --out"),
        (["--resume", "--out", "/nowhere"], "holds no run"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], message: str, beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    arguments = [str(beton) if a == "DATA" else a for a in arguments]
    if "--out" not in arguments and "--resume" not in arguments and arguments:
        arguments += ["--out", str(out)]
    assert message in one_line(capsys, *arguments)
    assert not out.exists()  # nothing half-written


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_asked_for_and_absent(beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "no CUDA device" in one_line(capsys, "--data", beton, "--out", tmp_path / "run", *FLAGS, "--device", "cuda")


@pytest.mark.parametrize(
    ("flags", "named"), [("--epoch 3", "--epochs"), ("--method simsiam --num-views 4", "num-views")]
)
def test_flags_that_do_not_exist(flags: str, named: str, beton: Path, capsys: pytest.CaptureFixture) -> None:
    """The nearest is named; options of another method are none."""
    with pytest.raises(SystemExit) as ended:
        train("--data", beton, *flags.split())
    assert ended.value.code == 2
    assert named in capsys.readouterr().err


def test_another_run_is_never_overwritten(
    beton: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = {p.name: p.read_bytes() for p in finished.iterdir()}
    assert "--resume, replace it with --overwrite" in one_line(capsys, "--data", beton, "--out", finished, *FLAGS)
    assert {p.name: p.read_bytes() for p in finished.iterdir()} == before
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "holds no run" in one_line(capsys, "--data", beton, "--out", tmp_path, *FLAGS, "--overwrite")
    assert (tmp_path / "thesis.tex").exists()


def test_overwrite_replaces_the_run_and_nothing_else(beton: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert small_run(beton, folder, "--max-steps", "2") == 0
    (folder / "notes.txt").write_text("mine")
    assert small_run(beton, folder, "--max-steps", "1", "--overwrite") == 0
    assert sorted(losses(folder)) == [1] and (folder / "notes.txt").read_text() == "mine"


def test_resume_refuses_another_recipe_or_other_data(
    beton: Path, val_beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "run"
    assert small_run(beton, folder, "--max-steps", "2") == 0
    assert "cannot change lr from 0.125 to 0.5" in one_line(capsys, "--out", folder, "--resume", "--lr", "0.5")
    assert "resume with the same data" in one_line(capsys, "--out", folder, "--resume", "--data", val_beton)
    (folder / "checkpoint.pt").write_bytes(b"garbage")
    assert "not a checkpoint" in one_line(capsys, "--out", folder, "--resume")


def test_a_loss_that_is_not_a_number_keeps_the_last_checkpoint(
    beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "run"
    assert small_run(beton, folder, "--precision", "fp32", "--checkpoint-minutes", "0.00001", "--max-steps", "3") == 0
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    state["method"]["predictor.3.bias"][:] = float("nan")
    torch.save(state, folder / "checkpoint.pt")
    poisoned = (folder / "checkpoint.pt").read_bytes()
    error = one_line(capsys, "--out", folder, "--resume", "--max-steps", "12")
    assert "the loss is nan at step 4" in error and "last good checkpoint is kept" in error
    assert (folder / "checkpoint.pt").read_bytes() == poisoned  # not written again
    assert not [p for p in folder.iterdir() if p.name.endswith(".tmp")]


@pytest.mark.filterwarnings("ignore:replaced")
def test_a_jpeg_that_breaks_while_training_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = write_beton(tmp_path / "data.beton", 16)
    overwrite(data, 5)
    arguments = ["--data", data, *FLAGS, "--epochs", "1", "--out"]
    error = one_line(capsys, *arguments, tmp_path / "a")
    assert "sample 5 of" in error and "--on-bad-sample skip" in error
    assert train(*arguments, tmp_path / "b", "--on-bad-sample", "skip") == 0
    assert "broken samples replaced" in capsys.readouterr().out


def test_an_unknown_field_of_a_saved_configuration_is_named(tmp_path: Path) -> None:
    config = configs.typed_config("fastsiam")()
    config.run.out, config.data.data, config.method_options.num_views = Path("x/y"), "d.beton", 3
    file = tmp_path / "config.yaml"
    configs.save_yaml(config, file)
    assert configs.load_yaml(file) == config
    file.write_text(file.read_text().replace("epochs", "epoch"))
    with pytest.raises(ValueError, match=r"unknown field optim\.epoch, meant epochs"):
        configs.load_yaml(file)


# ------------------------------------------------------------------ several processes


@pytest.mark.slow
def test_two_processes_see_the_order_of_one(beton: Path, tmp_path: Path) -> None:
    """torchrun with gloo: the same samples per step as one process, and weights that stay in step."""
    script = tmp_path / "probe.py"
    script.write_text(
        "import json, os, sys\n"
        "from fastssl import train\n"
        "from fastssl.training.step import Step\n"
        "seen, step = [], Step.__call__\n"
        "def probe(self, batch, progress):\n"
        "    result = step(self, batch, progress)\n"
        "    weight = self.method.projector[0].weight.double().sum().item()\n"
        "    seen.append((batch.index.tolist(), weight))\n"
        "    return result\n"
        "Step.__call__ = probe\n"
        "status = train.main(sys.argv[1:])\n"
        "json.dump(seen, open(os.path.join(os.path.dirname(__file__), os.environ.get('RANK', 'one') + '.json'), 'w'))\n"
        "sys.exit(status)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    base = [str(script), "--data", str(beton), *FLAGS, "--epochs", "1", "--workers", "1"]
    one = [sys.executable, *base, "--out", str(tmp_path / "one")]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *base]
    two += ["--out", str(tmp_path / "two")]
    for command in (one, two):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    alone, first, second = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one", "0", "1"))
    assert [a + b for (a, _), (b, _) in zip(first, second, strict=True)] == [index for index, _ in alone]
    assert [w for _, w in first] == [w for _, w in second]
    assert (tmp_path / "two" / "weights.safetensors").exists()


# ------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_run_on_a_gpu_learns_resumes_and_exports(
    beton: Path, val_beton: Path, tmp_path: Path, precision: str
) -> None:
    """AMP with and without loss scaling, compiled parts, device augmentation, the kNN monitor, resume, export."""
    folder = tmp_path / "run"
    monitor = ("--val", val_beton, "--knn-k", "5", "--device", "cuda", "--precision", precision)
    assert small_run(beton, folder, *monitor, "--max-steps", "7") == 0
    assert train("--out", folder, "--resume", "--max-steps", "12") == 0
    assert sorted(losses(folder)) == list(range(1, 13))
    state = load_file(folder / "weights.safetensors")
    model = torchvision.models.resnet18()
    model.fc = torch.nn.Identity()
    model.load_state_dict(state, strict=True)
    assert all(v.isfinite().all() for v in state.values())


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        "--method fastsiam --compile on",  # half a minute: the others run uncompiled
        *(f"--method {name}" for name in methods.available()),
        "--method fastmoco --combine-by beta --combine-weight 1",
        "--method fastmoco --patches sample-encode-combine",
        "--method fastmoco --patches montage",
        "--method simsiam --guided guided",
        "--method fastsiam --guided random --no-fixed-points",
        "--method mocov2 --bn-splits 2 --num-local 2 --local-size 32 --alpha 0.4",
        "--method swav --queue-size 16 --queue-from-epoch 0",
        "--method dino --num-local 2 --local-size 32 --backbone vit-t16",
    ],
)
def test_no_step_waits_for_the_gpu(beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str) -> None:
    """Between logging steps nothing synchronises, in any method: torch raises if something does."""
    forbid_waiting(monkeypatch)
    # Not LARS, whose steps in fp16 wait by design (optimizers.make_optimizer).
    small = "--backbone resnet18 --size 64 --batch-size 8 --epochs 2 --warmup-epochs 0 --log-every 6 --max-steps 6"
    common = ["--device", "cuda", "--compile", "off", "--optimizer", "sgd", *small.split()]
    arguments = ["--data", beton, "--out", tmp_path / "run", *common, *options.split()]
    assert train(*arguments) == 0


# --- The data pipeline ------------------------------------------------------------------------------------------------


def test_every_epoch_says_where_its_time_went(finished: Path, beton: Path, tmp_path: Path, capsys) -> None:
    entries = [e for e in logs.read_metrics(finished / logs.METRICS) if "ms_per_image" in e]
    assert [e["epoch"] for e in entries] == [1, 2]
    for entry in entries:
        assert {"read", "decode", "crop", "augment", "network", "wait"} <= entry["ms_per_image"].keys()
        assert entry["ms_per_image"]["network"] > 0 and entry["limit"] in entry["capacity"]
    assert small_run(beton, tmp_path / "run", "--backend", "cpu") == 0
    out = capsys.readouterr().out
    assert "ms per image: read" in out and "limit: the network" in out and " to go" in out and "backend cpu" in out


def test_several_files_are_one_data_set_and_page_order_trains(beton: Path, val_beton: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert train("--data", f"{beton},{val_beton}", "--out", folder, *FLAGS, "--order", "page") == 0
    assert max(losses(folder)) == 2 * ((48 + 20) // 8)


def test_a_run_goes_on_with_the_backend_it_began_with(beton: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "run"
    assert small_run(beton, folder, "--max-steps", "3") == 0
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["backend"] == "resident"
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    torch.save(state | {"backend": "cpu"}, folder / "checkpoint.pt")
    capsys.readouterr()
    assert train("--out", folder, "--resume", "--max-steps", "6") == 0
    assert "backend cpu" in capsys.readouterr().out
    assert train("--out", folder, "--resume", "--backend", "resident", "--max-steps", "9") == 0


def test_sizes_follow_their_schedule(beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Equal shares of the epochs; a resumed run goes on with the size that was due, and the same losses."""
    words = ["--epochs", "4", "--size", "32", "--size-schedule", "16:24:32", "--backbone", "resnet18-cifar"]
    whole, parts, bad = (tmp_path / name for name in ("whole", "parts", "bad"))
    seen, step = [], Step.__call__

    def look(self: Step, batch: Batch, progress: Progress) -> object:
        seen.append(batch.views[0].shape[-1])
        return step(self, batch, progress)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "__call__", look)
        assert small_run(beton, whole, *words) == 0
    per_epoch = len(seen) // 4
    assert seen == [16] * 2 * per_epoch + [24] * per_epoch + [32] * per_epoch
    assert small_run(beton, parts, *words, "--max-steps", 2 * per_epoch + 1) == 0
    assert train("--out", parts, "--resume", "--max-steps", 4 * per_epoch) == 0
    assert losses(whole) == losses(parts) and len(losses(whole)) == 4 * per_epoch
    for schedule, why in (
        ("16:24", "the last one --size 32"),
        ("4:32", "8 px or more"),
        ("8:8:8:8:32", "an epoch for each"),
    ):
        assert small_run(beton, bad, *words, "--size-schedule", schedule) == 2
        assert why in capsys.readouterr().err and not bad.exists()
