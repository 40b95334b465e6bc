"""The step benchmark: variants that differ in what they say, peers that compute the same loss, counts, the command."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from pathlib import Path

import pytest
import torch
from small import TinyResNet, made
from torch import Tensor, nn

from benchmarks import common, step
from benchmarks.peers import PEERS, Lightly, SimSiam
from benchmarks.step import VARIANTS, StepContestant, StepOptions
from fastssl.device import pick_precision
from fastssl.training.build import make_method
from loaders import Batch

run_command = functools.partial(common.main, "step", StepOptions, step.measure)
CPU = torch.device("cpu")
B, K, S = 4, 4, 32
SMALL = StepOptions(backbones=("resnet18",), batch_size=B, size=S, repeats=2, device="cpu")


@pytest.fixture(scope="module")
def views() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, 3, S, S, generator=generator) for _ in range(K)]


@pytest.fixture
def no_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is one second further whenever it is read."""
    ticks = itertools.count()
    monkeypatch.setattr(step.PartTimer, "now", lambda _self: float(next(ticks)))


def moved_by(contestant: StepContestant) -> int:
    """How many weights a step changes: not all, zero_init_residual keeps some."""
    before = [w.clone() for w in contestant.weights]
    contestant()
    return sum(not torch.equal(a, b) for a, b in zip(before, contestant.weights, strict=True))


# --- The same step ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "num_views"), [("fastsiam", 4), ("fastsiam", 3), ("simsiam", 2)])
def test_the_plain_form_has_the_methods_loss_and_gradients(name: str, num_views: int) -> None:
    _, method, batch = made(name, **({"num_views": num_views} if name == "fastsiam" else {}))
    for form in (method, lambda batch: step.separate_views(method, batch)):
        method.zero_grad()
        loss, _ = form(batch)
        loss.backward()
        grads = [p.grad.clone() for p in method.parameters()]
        if form is method:
            expected, expected_grads = loss.item(), grads
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    largest = max(g.abs().max() for g in expected_grads)
    assert all((a - b).abs().max() < 1e-4 * largest for a, b in zip(grads, expected_grads, strict=True))


def test_variants_are_what_they_say(views: list[Tensor]) -> None:
    amp = pick_precision("bf16", CPU).dtype
    config = dataclasses.replace(SMALL, precision="bf16")
    for name, dtype, last in (("eager", None, False), ("channels-last", None, True), ("one-pass", amp, True)):
        c = step.ours(config, "resnet18", VARIANTS[name], views, CPU)
        weights = [w for w in c.weights if w.ndim == 4 and min(w.shape[1], w.shape[2]) > 1]
        assert c.dtype == dtype and {x.dtype for x in c.views} == {dtype or torch.float32}
        for x in (*weights, *c.views):
            assert x.is_contiguous(memory_format=torch.channels_last) == last
            assert x.is_contiguous() != last
        assert moved_by(c) > 30


@pytest.mark.skipif(PEERS["lightly"].missing() is not None, reason="lightly is not installed")
def test_lightlys_step_has_this_projects_loss(views: list[Tensor]) -> None:
    trained = Lightly(TinyResNet(), TinyResNet.width, CPU)
    expected = plain_loss(trained.net, views)
    assert trained(views).item() == pytest.approx(expected, rel=1e-5)


def test_simsiams_step_has_this_projects_loss(views: list[Tensor]) -> None:
    trained = SimSiam(TinyResNet(), TinyResNet.width, CPU)
    expected = plain_loss(trained.net, views[:2])
    assert trained(views[:2]) == pytest.approx(expected, rel=1e-5)


def plain_loss(net: nn.ModuleList, views: list[Tensor]) -> float:
    """Of backbone, projector and predictor."""
    method = nn.Module()
    method.backbone, method.projector, method.predictor = net
    loss, _ = step.separate_views(method, Batch(views, None, torch.arange(B), torch.arange(B)))
    return loss.item()


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if peer.missing() is None])
def test_peers_train_on_their_views(views: list[Tensor], name: str) -> None:
    c = step.peer(SMALL, "resnet18", name, views, CPU)
    assert len(c.views) == (2 if name == "simsiam" else K)
    assert all(x.dtype == torch.float32 and x.is_contiguous() for x in c.views)
    assert moved_by(c) > 30


# --- Parts, memory ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_seconds")
def test_parts_of_a_step(views: list[Tensor]) -> None:
    c = step.ours(SMALL, "resnet18", VARIANTS["eager"], views, CPU)
    # The clock is read at the begin, before forward, around four calls of the network, at three more borders.
    expected = {"backbone": 4000.0, "rest of forward": 5000.0, "backward": 1000.0, "optimiser": 2000.0}
    assert c.timer.measure(c) == expected
    c()  # between measurements the clock is not read
    assert c.timer.measure(c) == expected


@pytest.mark.usefixtures("no_seconds")
def test_one_pass_is_one_pass_and_hooks_of_the_method_are_called(
    views: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []

    def with_hook(config):
        method = make_method(config)
        method.after_backward = called.append
        return method

    monkeypatch.setattr(step, "make_method", with_hook)
    c = step.ours(SMALL, "resnet18", VARIANTS["one-pass"], views, CPU)
    parts = c.timer.measure(c)
    assert parts["backbone"] == 1000 and len(called) == 1 and called[0].steps == 1000


def test_saved_bytes_are_distinct_and_without_weights() -> None:
    weight = torch.randn(8, 16, requires_grad=True)
    x = torch.randn(4, 16, requires_grad=True)  # so that the weight is kept, too

    def take(_views: list[Tensor]) -> None:
        y = torch.nn.functional.linear(x, weight).exp()  # keeps x, the weight, and y
        (y * y).sum().backward()  # keeps y twice

    assert step.saved_bytes(StepContestant(take, [x], [weight], None)) == x.nbytes + 4 * 8 * 4


# --- The command ------------------------------------------------------------------------------------------------------

COMMAND = ("--backbones", "resnet18", "--batch-size", "2", "--size", "32", "--device", "cpu")


def test_the_command(tmp_path: Path, beton: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "step.json"
    only = ("--only", "eager", "amp", "one-pass", "simsiam", "reduce-overhead", "copy", "matmul-amp")
    rest = ("--data", str(beton), "--repeats", "2", "--steps", "1", "--precision", "bf16", "--json", str(out))
    assert run_command([*COMMAND, *rest, *only]) == 0
    content = json.loads(out.read_text())
    rows = {r["contestant"]: r for r in content["results"]}
    assert list(rows) == ["eager", "amp", "one-pass", "simsiam", "copy", "matmul-amp"]
    assert content["skipped"] == {"reduce-overhead": "CUDA graphs need a GPU"}
    ours = rows["one-pass"]["ms_per_view"]["values"]
    for name in ("eager", "amp", "one-pass", "simsiam"):
        r = rows[name]
        num = 2 if name == "simsiam" else 4
        assert len(r["ms_per_step"]["values"]) == 2 and r["num_views"] == num
        per_view = [ms / num / 2 for ms in r["ms_per_step"]["values"]]
        assert r["ms_per_view"]["values"] == pytest.approx(per_view)
        assert r["over_ours"]["values"] == pytest.approx([a / b for a, b in zip(per_view, ours, strict=True)])
        assert r["saved_gb"] > 0 and r["peak_gb"] is None
        seconds = [ms / 1000 for ms in r["ms_per_step"]["values"]]
        assert r["gb_per_s"]["values"] == pytest.approx([r["moved_gb"] / s for s in seconds])
        assert r["tflop_per_s"]["values"] == pytest.approx([r["tflop"] / s for s in seconds])
        copied = rows["copy"]["per_s"]["median"] / 1e9
        assert r["of_copy"]["values"] == pytest.approx([r["moved_gb"] / s / copied for s in seconds])
    assert rows["eager"]["tflop"] == pytest.approx(rows["one-pass"]["tflop"], rel=1e-3)
    assert rows["simsiam"]["tflop"] == pytest.approx(rows["eager"]["tflop"] / 2, rel=1e-3)
    assert rows["one-pass"]["moved_gb"] < rows["amp"]["moved_gb"] < rows["eager"]["moved_gb"]
    assert rows["eager"]["of_matmul"] is None and rows["amp"]["of_matmul"] is not None
    assert rows["simsiam"]["parts_ms"] is None and set(rows["amp"]["parts_ms"]) == set(step.PARTS)
    assert all(len(part["values"]) == 2 for part in rows["amp"]["parts_ms"].values())
    printed = capsys.readouterr().out
    assert "aim: resnet18 one-pass, times the speed of amp:" in printed
    assert "without reduce-overhead: CUDA graphs need a GPU" in printed


def test_one_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    make = step.make

    def out_of_memory(config, backbone, name, *rest):
        if name == "eager":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return make(config, backbone, name, *rest)

    monkeypatch.setattr(step, "make", out_of_memory)
    assert run_command([*COMMAND, "--repeats", "1", "--only", "eager", "simsiam"]) == 0
    printed = capsys.readouterr().out
    assert "without eager of resnet18: CUDA out of memory.\n" in printed and "│ simsiam" in printed
    assert run_command([*COMMAND, "--repeats", "1", "--only", "eager"]) == 0
    assert capsys.readouterr().out == "without eager of resnet18: CUDA out of memory.\n"


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    fp32 = dataclasses.replace(SMALL, precision="fp32")
    assert VARIANTS["amp"].missing(fp32, CPU).startswith("mixed precision is off")
    assert VARIANTS["one-pass"].missing(fp32, CPU) is None
    monkeypatch.setattr(step.shutil, "which", lambda _name: None)
    assert VARIANTS["compiled"].missing(SMALL, CPU) == "no C++ compiler: install g++"
    assert VARIANTS["reduce-overhead"].missing(SMALL, torch.device("cuda")) is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--only", "egaer"), "eager"),
        (("--backbones", "resnet17"), "resnet17"),
        (("--batch-size", "1"), "--batch-size is 1"),
        (("--steps", "0"), "--steps is 0"),
        (("--only", "one-pass", "--card-gb", "11"), "--card-gb"),
        (("--only", "copy"), "nobody is left"),
        (("--data", "nowhere.beton", "--only", "eager"), "nowhere.beton does not exist"),
    ],
)
def test_bad_input_is_one_line(given: tuple[str, ...], said: str, capsys: pytest.CaptureFixture) -> None:
    assert run_command([*COMMAND, *given]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_verdicts() -> None:
    assert step.verdict("a", 1.31, 1.3) == "aim: a: 1.31, wanted >= 1.3: pass"
    assert step.verdict("a", 1.29, 1.3) == "aim: a: 1.29, wanted >= 1.3: FAIL"
    assert step.verdict("b", 11.2, 11, at_most=True) == "aim: b: 11.2, wanted <= 11: FAIL"
    assert step.verdict("b", 7.5, 11, at_most=True) == "aim: b: 7.50, wanted <= 11: pass"


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "step.json"
    small = ("--backbones", "resnet18", "--batch-size", "8", "--size", "64", "--steps", "2", "--json", str(out))
    assert run_command([*small, "--only", "eager", "amp", "one-pass", "compiled"]) == 0
    rows = {r["contestant"]: r for r in json.loads(out.read_text())["results"]}
    for r in rows.values():
        assert r["peak_gb"] > r["saved_gb"] > 0
        assert all(part["median"] > 0 for part in r["parts_ms"].values())
    assert rows["compiled"]["moved_gb"] is None and rows["compiled"]["tflop"] == rows["one-pass"]["tflop"]
    assert "aim: resnet18 compiled" in capsys.readouterr().out
    assert run_command([*small, "--only", "one-pass", "--card-gb", "500"]) == 0
    assert "wanted <= 500: pass" in capsys.readouterr().out
