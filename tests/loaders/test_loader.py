"""The loader: same views whatever the batch size, the workers or the restarts; errors; clean ends."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import overwrite, write_beton

import loaders
from loaders import UserError, augmenter, producer
from loaders.augment import DeviceAugment
from loaders.batch import empty_images
from loaders.job import BadSample
from loaders.views import View

SPEC = loaders.views.simsiam(3, 40)


def collect(path: Path, *, epoch: int = 0, start_step: int = 0, **options: object) -> dict[int, list[torch.Tensor]]:
    """Sample id -> its views, over one epoch."""
    seen = {}
    with loaders.open(path, options.pop("spec", SPEC), **options) as loader:
        for batch in loader.epoch(epoch, start_step):
            for row, index in enumerate(batch.index.tolist()):
                assert index not in seen
                seen[index] = [v[row].clone() for v in batch.views]
    return seen


def same(a: dict[int, list[torch.Tensor]], b: dict[int, list[torch.Tensor]]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, y) for i in a for x, y in zip(a[i], b[i], strict=True))


def test_views_depend_on_seed_epoch_and_sample_alone(beton: Path) -> None:
    reference = collect(beton, batch_size=8, epoch=1, workers=1)
    assert len(reference) == 48
    assert same(reference, collect(beton, batch_size=16, epoch=1, workers=3, prefetch=1))
    assert same(reference, collect(beton, batch_size=6, epoch=1, order="sequential", workers=2))
    assert not same(reference, collect(beton, batch_size=8, epoch=2))
    assert not same(reference, collect(beton, batch_size=8, epoch=1, seed=1))


def test_an_epoch_can_be_entered_anywhere(beton: Path) -> None:
    with loaders.open(beton, SPEC, batch_size=8) as loader:
        whole = [(b.index.clone(), [v.clone() for v in b.views]) for b in loader.epoch(3)]
        assert len(whole) == len(loader) == 6
        for start in (0, 2, 5, 6):
            rest = [(b.index.clone(), [v.clone() for v in b.views]) for b in loader.epoch(3, start)]
            for (i, v), (j, w) in zip(whole[start:], rest, strict=True):
                assert torch.equal(i, j) and all(torch.equal(a, b) for a, b in zip(v, w, strict=True))


def test_page_order_is_one_more_order_of_the_same_views(beton: Path) -> None:
    reference = collect(beton, batch_size=8, epoch=1)
    assert same(reference, collect(beton, batch_size=8, epoch=1, order="page", page_window=1))
    ranks = [collect(beton, batch_size=4, epoch=1, order="page", rank=r, world=2) for r in (0, 1)]
    assert not ranks[0].keys() & ranks[1].keys() and same(reference, ranks[0] | ranks[1])


def test_the_next_epoch_is_made_ahead_and_is_the_same(beton: Path) -> None:
    def batches(ahead: bool) -> list[tuple[list[int], torch.Tensor]]:
        with loaders.open(beton, SPEC, batch_size=8, prefetch=2) as loader:
            threads, seen = set(), []
            for epoch in range(4):
                seen += [(b.index.tolist(), b.views[2].clone()) for b in loader.epoch(epoch, ahead=ahead and epoch < 3)]
                threads.add(loader.producer.thread)
            assert len(threads) == (1 if ahead else 4)
            return seen

    for (i, v), (j, w) in zip(batches(False), batches(True), strict=True):
        assert i == j and torch.equal(v, w)


def test_another_epoch_than_the_announced_one_may_be_asked_for(beton: Path) -> None:
    with loaders.open(beton, SPEC, batch_size=8) as loader:
        assert len(list(loader.epoch(0, ahead=True))) == 6
        ids = [b.index.tolist() for b in loader.epoch(5, 2, ahead=True)]
        assert len(list(itertools.islice(loader.epoch(6), 3))) == 3
    with loaders.open(beton, SPEC, batch_size=8) as loader:
        assert ids == [b.index.tolist() for b in loader.epoch(5, 2)]


def test_an_error_in_the_next_epoch_belongs_to_it(tmp_path: Path) -> None:
    path = write_beton(tmp_path / "late.beton", 12)
    with loaders.open(path, SPEC, batch_size=3, backend="cpu") as loader:
        start = loader.backend.start

        def failing(job):
            if job.epoch == 1:
                raise BadSample(str(path), 3, "broken")
            return start(job)

        loader.backend.start = failing
        assert len(list(loader.epoch(0, ahead=True))) == 4
        with pytest.raises(BadSample):
            list(loader.epoch(1))


def test_multicrop_and_tiles(beton: Path) -> None:
    spec = loaders.views.multicrop(48, 24, num_local=3)
    views = next(iter(collect(beton, batch_size=8, spec=spec).values()))
    assert [v.shape[-1] for v in views] == [48, 48, 24, 24, 24]
    spec = loaders.views.simsiam(2, 40, divide=2)
    with loaders.open(beton, spec, batch_size=8) as loader:
        batch = next(iter(loader.epoch()))
        assert [t.shape for t in batch.tiles] == [(32, 3, 20, 20)] * 2
        assert torch.equal(batch.tiles[1][8:16], batch.views[1][:, :, 20:, :20])  # second tile: bottom left


def test_memory_is_reused(beton: Path) -> None:
    with loaders.open(beton, SPEC, batch_size=4, prefetch=2) as loader:
        pointers = {b.views[0].data_ptr() for e in range(3) for b in loader.epoch(e)}
    assert len(pointers) <= 3


def test_a_batch_stays_valid_until_the_next_is_asked_for(beton: Path) -> None:
    reference = collect(beton, batch_size=4, workers=1)
    with loaders.open(beton, SPEC, batch_size=4, workers=2, prefetch=2) as loader:
        for batch in loader.epoch():
            threading.Event().wait(0.02)  # time enough for the others to be filled
            for row, index in enumerate(batch.index.tolist()):
                assert torch.equal(batch.views[1][row], reference[index][1])


def test_sequential_gives_every_sample_once_and_a_short_last_batch(beton: Path) -> None:
    spec = loaders.views.evaluation(32)
    with loaders.open(beton, spec, batch_size=20, order="sequential") as loader:
        assert [len(b.index) for b in loader.epoch()] == [20, 20, 8] and len(loader) == 3
    subset = np.array([5, 1, 40])
    with loaders.open(beton, spec, batch_size=2, order="sequential", subset=subset) as loader:
        assert [i for b in loader.epoch() for i in b.index.tolist()] == [5, 1, 40]


def test_synthetic_needs_no_pixels(beton: Path) -> None:
    with loaders.open(beton, SPEC, batch_size=8, backend="synthetic") as loader:
        batches = [(b.index.tolist(), b.views[0].shape) for b in loader.epoch(1)]
        assert loader.stats.decode == 0 and loader.stats.images == 48
    with loaders.open(beton, SPEC, batch_size=8) as loader:
        assert batches == [(b.index.tolist(), b.views[0].shape) for b in loader.epoch(1)]


def test_stats_count_every_stage(beton: Path) -> None:
    with loaders.open(beton, SPEC, batch_size=8, backend="cpu") as loader:
        list(loader.epoch())
        stats = loader.stats.snapshot()
    assert stats["images"] == 48
    assert all(stats[s] > 0 for s in ("read", "decode", "crop", "augment", "wait"))


def test_torch_threads_of_the_caller_are_left_alone(beton: Path) -> None:
    before = torch.get_num_threads()
    collect(beton, batch_size=8, workers=2)
    assert torch.get_num_threads() == before


def test_a_file_of_broken_samples_ends(tmp_path: Path) -> None:
    path = write_beton(tmp_path / "all.beton", 6)
    overwrite(path, *range(6))
    with pytest.raises(UserError, match="more broken than whole"), pytest.warns(UserWarning):
        collect(path, batch_size=2, on_bad_sample="skip")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 49}, "larger than .*use --batch-size 48"),
        ({"batch_size": 30, "world": 2}, "use --batch-size 24"),
        ({"batch_size": 8, "backend": "cpuu"}, "did you mean 'cpu'"),
        ({"batch_size": 8, "order": "radnom"}, "unknown order"),
        ({"batch_size": 8, "on_bad_sample": "cry"}, "unknown on_bad_sample"),
        ({"batch_size": 0}, "at least 1"),
        ({"batch_size": 8, "workers": 0}, "at least 1"),
    ],
)
def test_options_that_make_no_sense(beton: Path, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        loaders.open(beton, SPEC, **options)


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("loaders.loader, loaders.convert.command", "fastssl"),
        ("loaders.loader", "loaders.convert"),
        ("loaders, loaders.views, loaders.convert.command", "torch"),  # `fastssl-convert --help` starts in 0.3 s
        ("loaders.convert.command", "rich"),
    ],
)
def test_what_an_import_does_not_pull_in(modules: str, absent: str) -> None:
    code = f"import sys, {modules}; sys.exit(any(f'{{m}}.'.startswith('{absent}.') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


class Nothing:
    """Stands in for a CUDA stream and for an event."""

    def __init__(self, *_: object, **__: object):
        pass

    def record_event(self, event: object = None) -> object:
        return event or Nothing()

    def wait_event(self, _event: object) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, _end: object) -> float:
        return 1.0


@pytest.mark.parametrize("views_ahead", [True, False])
def test_a_batch_on_its_way_to_a_gpu(beton: Path, monkeypatch: pytest.MonkeyPatch, views_ahead: bool) -> None:
    """Which thread makes what and when slots are free again; streams, pinned memory and compiling are left out."""
    for name in ("Stream", "Event", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Nothing)
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: contextlib.nullcontext())
    monkeypatch.setattr(augmenter, "DeviceAugment", lambda spec, _device, dtype: DeviceAugment(spec, "cpu", dtype))
    monkeypatch.setattr(producer, "empty_images", lambda *shape, **_: empty_images(*shape))
    options = {"batch_size": 8, "backend": "cpu"}
    host = collect(beton, **options)
    device = collect(beton, device="cuda", views_ahead=views_ahead, **options)
    assert host.keys() == device.keys()
    assert all((a - b).abs().max() < 1e-3 for i in host for a, b in zip(host[i], device[i], strict=True))
    with loaders.open(beton, SPEC, device="cuda", views_ahead=views_ahead, **options) as loader:
        assert loader.memory().batches == (4 if views_ahead else 1)
        assert [len(b.index) for b in itertools.islice(loader.endless(), 13)] == [8] * 13
        assert loader.stats.device > 0


@pytest.mark.parametrize("backend", ["cpu", "resident"])
def test_crops_alone(beton: Path, backend: str) -> None:
    plain = dataclasses.replace(SPEC, views=tuple(View(v.size, scale=v.scale) for v in SPEC.views))
    plain = dataclasses.replace(plain, mean=(0, 0, 0), std=(1 / 255,) * 3)
    crops = collect(beton, batch_size=8, backend=backend, spec=SPEC, augment=False)
    views = collect(beton, batch_size=8, backend=backend, spec=plain)
    assert crops.keys() == views.keys() and next(iter(crops.values()))[0].dtype == torch.uint8
    assert all((c.float() - v).abs().max() < 1e-3 for i in crops for c, v in zip(crops[i], views[i], strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_device_views_are_the_hosts(beton: Path) -> None:
    host = collect(beton, batch_size=8)
    device = {i: [v.cpu() for v in views] for i, views in collect(beton, batch_size=8, device="cuda").items()}
    assert host.keys() == device.keys()
    for i in host:
        for a, b in zip(host[i], device[i], strict=True):
            assert (a - b).abs().max() < 2 / 255 / 0.224


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_device_loader_never_makes_the_training_thread_wait(beton: Path) -> None:
    with loaders.open(beton, SPEC, batch_size=8, device="cuda") as loader:
        list(loader.epoch())  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in loader.epoch(1):
                batch.views[0].sum()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_views_made_late_are_the_same_and_alone(beton: Path) -> None:
    """At most one batch of views is on the device, also while the next one is made."""
    spec = loaders.views.simsiam(K=2, size=96)
    ahead = collect(beton, spec=spec, batch_size=4, device="cuda")
    with loaders.open(beton, spec, batch_size=4, device="cuda", prefetch=8, views_ahead=False) as loader:
        list(loader.epoch())  # compiles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for batch in loader.epoch():
            for row, i in enumerate(batch.index.tolist()):
                assert all(torch.equal(v[row], w) for v, w in zip(batch.views, ahead[i], strict=True))
        views = 2 * 4 * 3 * 96 * 96 * 4
        assert torch.cuda.max_memory_allocated() - before < 6 * views  # with what is in between
        assert not batch.views
