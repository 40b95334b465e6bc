"""The example in docs/adding-a-method.md: one file that is found, explained, trained and resumed like any other."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small import TinyResNet, batch_of, made

from fastssl import methods, processes
from fastssl.train import main
from fastssl.training import build as core
from fastssl.training import log as logs
from loaders import UserError

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its name: the file lies in a folder of the test's that counts as part of fastssl/methods."""
    page = (ROOT / "docs" / "adding-a-method.md").read_text("utf-8")
    code = re.search(r"^```python\n(.*?)^```", page, re.S | re.M)[1]
    name = re.search(r"`fastssl/methods/(\w+)\.py`", page)[1]
    assert name not in methods.available()
    folder = tmp_path_factory.mktemp("methods")
    (folder / f"{name}.py").write_text(code, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "__path__", [*methods.__path__, str(folder)])
        yield name
    sys.modules.pop(f"{methods.__name__}.{name}", None)
    vars(methods).pop(name, None)


def test_it_trains_and_resumes(example: str, beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert example in methods.available()
    monkeypatch.setattr(core, "backbone", lambda *_, **__: (TinyResNet(), TinyResNet.width))
    monkeypatch.setattr(logs, "save_curves", lambda *_: None)  # half of the time
    words = f"--method {example} --data {beton} --out {tmp_path / 'run'} --size 32 --blur 0 --batch-size 8 --epochs 1"
    words += " --dim 32 --projector-hidden 32 --warmup-epochs 0 --log-every 1 --recipe byol"
    assert main([*words.split(), "--max-steps", "1"]) == 0
    assert main(["--out", str(tmp_path / "run"), "--resume", "--max-steps", "2"]) == 0
    entries = [e for e in logs.read_metrics(tmp_path / "run" / logs.METRICS) if "loss" in e]
    assert [e["step"] for e in entries] == [1, 2] and all("feature_std" in e for e in entries)


def test_its_options_are_flags_with_help(example: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--method", example, "--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--redundancy" in text and "correlations between different features" in text
    with pytest.raises(UserError, match="--redundancy"):
        made(example, redundancy=-1.0)


def test_it_is_its_equation(example: str) -> None:
    """Zbontar et al., eq. 1 and 2, written as they stand: sums over the batch of centred features."""
    config, method, batch = made(example, dim=8, redundancy=0.1)
    a, b = (method.projector(method.backbone(view)) for view in batch.views)
    a, b = a - a.mean(0), b - b.mean(0)
    expected = 0.0
    for i in range(8):
        for j in range(8):
            c = (a[:, i] * b[:, j]).sum() / (a[:, i].square().sum().sqrt() * b[:, j].square().sum().sqrt())
            expected = expected + ((1 - c) ** 2 if i == j else config.method_options.redundancy * c**2)
    loss, metrics = method(batch)
    torch.testing.assert_close(loss, expected)
    assert not metrics["feature_std"].requires_grad
    loss.backward()
    assert all(p.grad is not None for p in method.parameters())


def test_its_correlations_are_over_all_processes(example: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what the other process would send appended, the loss is that of the images of both."""
    _, method, _ = made(example)
    method.eval()
    both = batch_of(core.make_views(made(example)[0]), 8)
    whole, _ = method(both)
    mine, theirs = ([view[half] for view in both.views] for half in (slice(4), slice(4, 8)))
    sent = iter([method.projector(method.backbone(view)) for view in theirs])
    monkeypatch.setattr(processes, "gather_with_grad", lambda x: torch.cat([x, next(sent)]))
    both.views = mine
    torch.testing.assert_close(method(both)[0], whole)


def test_it_is_a_page(example: str) -> None:
    code = Path(methods.load(example).__file__).read_text("utf-8")
    assert len(code.splitlines()) < 60
    assert ast.get_docstring(ast.parse(code))
