"""python -m benchmarks.loader: it runs, and everybody does the work they are timed for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.loader import Config, UsualDataset, contestants, main
from loaders.beton import Reader


def test_it_measures_every_contestant(beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out.json"
    flags = ["--num-views", "2", "--size", "32", "--images", "16", "--batch-size", "8", "--repeats", "2"]
    threads = torch.get_num_threads()
    try:
        assert main(["--data", str(beton), *flags, "--json", str(out)]) == 0
    finally:
        torch.set_num_threads(threads)
    measured = json.loads(out.read_text())["cpu_ms_per_view"]
    assert measured.keys() == {"floor", "crops", "views", "pil"}
    assert all(len(v) == 2 and min(v) > 0 for v in measured.values())
    printed = capsys.readouterr().out
    assert all(name in printed for name in measured)


def test_the_peers_views_look_like_ours(beton: Path) -> None:
    """Same recipe: the pixel moments of the peer's views are those of our loader's."""
    import loaders

    torch.manual_seed(0)
    np.random.seed(0)
    usual = UsualDataset(Reader(beton), 4, 32, 48)
    theirs = torch.stack([v for i in range(48) for v in usual[i]])
    with loaders.open(beton, loaders.views.simsiam(4, 32), batch_size=48, order="sequential") as loader:
        ours = torch.cat([v.clone() for v in next(iter(loader.epoch())).views])
    assert theirs.shape == ours.shape
    assert abs(theirs.mean() - ours.mean()) < 0.1
    assert abs(theirs.std() - ours.std()) < 0.1


def test_contestants_need_one_batch(beton: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["--data", str(beton), "--batch-size", "64"]) == 2
    assert "use --batch-size 48" in capsys.readouterr().err
    runs, num = contestants(Config(data=beton, num_views=2, size=32, batch_size=20))
    assert num == 40 and list(runs) == ["floor", "crops", "views", "pil"]
