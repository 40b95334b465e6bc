"""Training with the loader against synthetic views: the command on tiny data."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small import SMALL

from benchmarks import e2e
from benchmarks.peers import PEERS


def test_the_command(beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--repeats", "2", "--steps", "3", "--json", "e2e.json"]
    assert e2e.main(["--data", str(beton), *options, *SMALL, "--backend", "cpu"]) == 0
    loader, synthetic, stages = json.loads(Path("e2e.json").read_text())["results"]
    assert len(loader["images_per_s"]["values"]) == len(synthetic["images_per_s"]["values"]) == 2
    pairs = zip(loader["images_per_s"]["values"], synthetic["images_per_s"]["values"], strict=True)
    assert loader["of_synthetic"]["values"] == pytest.approx([a / b for a, b in pairs])
    assert stages["ms_per_image"]["decode"] > 0 and stages["ms_per_image"]["network"] > 0
    assert stages["limit"] == min(stages["capacity"], key=stages["capacity"].get)
    out = capsys.readouterr().out
    assert "of synthetic" in out and "limit:" in out
    assert "aim: speed with the loader, of that on synthetic views:" in out
    assert [p.name for p in tmp_path.iterdir()] == ["e2e.json"]  # no run folder


def test_peers_beside(beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    out = tmp_path / "e2e.json"
    options = ["--repeats", "2", "--steps", "2", "--peers", "simsiam", "lightly", "--peer-workers", "1"]
    monkeypatch.setitem(PEERS, "lightly", e2e.Peer(PEERS["lightly"].make, None, package="no_such", install="get it"))
    command = ["--data", str(beton), *options, "--json", str(out), *SMALL, "--num-views", "3", "--backend", "cpu"]
    assert e2e.main(command) == 0
    content = json.loads(out.read_text())
    loader, _synthetic, simsiam, _stages = content["results"]
    assert (loader["num_views"], simsiam["views_from"], simsiam["num_views"]) == (3, "simsiam", 2)
    for row in (loader, simsiam):
        expected = [row["num_views"] * rate for rate in row["images_per_s"]["values"]]
        assert len(expected) == 2 and row["views_per_s"]["values"] == pytest.approx(expected)
    pairs = zip(loader["views_per_s"]["values"], simsiam["views_per_s"]["values"], strict=True)
    assert simsiam["ours_over"]["values"] == pytest.approx([a / b for a, b in pairs])
    assert loader["ours_over"] is simsiam["of_synthetic"] is None
    assert content["skipped"] == {"lightly": "no_such is not installed: get it"}
    assert "without lightly: no_such is not installed: get it" in capsys.readouterr().out


def test_a_peers_workers_have_no_idle_moment_and_leave_nothing_behind() -> None:
    made, trained = [], []

    def loader(options, num_views, _workers):
        torch.set_num_threads(1)

        def round_(_number):
            for i in range(options.images // options.batch_size):
                made.append(i)
                yield [i] * num_views

        return round_

    peer = e2e.Peer(lambda *_: trained.append, loader, most_views=2)
    data = SimpleNamespace(size=32, data="x.beton")
    config = SimpleNamespace(data=data, model=SimpleNamespace(backbone="resnet18"))
    spec, loading = SimpleNamespace(K=4), SimpleNamespace(batch_size=8)
    setup = SimpleNamespace(config=config, device="cpu", spec=spec, loader=loading)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        other = e2e.PeerTraining(peer, setup, steps=5, workers=3)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    for _ in range(2):
        made.clear()
        trained.clear()
        other.begin()
        for _ in range(other.warm + 5):
            other.step()
        assert trained == [[i, i] for i in range(7 + 5)]  # two batches wait for each worker before a block counts
        other.end()
        assert made == [*range(7 + 5 + 6)]  # as many were still being made at its end, and are waited for


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--data", "nowhere.beton"], "nowhere.beton does not exist"),
        (["--peers", "lightely"], "lightly"),
        (["--steps", "0"], "--steps is 0"),
        (["--peers", "simsiam", "--peer-workers", "0"], "--peer-workers is 0"),
        (["--peers", "simsiam", "--method", "byol", "--backbone", "resnet18", "--size", "32"], "not byol"),
    ],
)
def test_bad_input_is_one_line(beton: Path, given: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    data = [] if "--data" in given else ["--data", str(beton), "--backend", "cpu"]
    assert e2e.main([*given, *data]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
