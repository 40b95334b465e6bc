"""What only the DALI backend does; what all backends have in common is in test_backends.py."""

from __future__ import annotations

import dataclasses
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import overwrite, write_beton

dali = pytest.importorskip("nvidia.dali")

from loaders import UserError, ViewSpec  # noqa: E402
from loaders.backends import dali as backend_module  # noqa: E402
from loaders.backends.dali import Backend  # noqa: E402
from loaders.beton import MODE_RAW, Reader, Writer  # noqa: E402
from loaders.job import BadSample, Job  # noqa: E402
from loaders.stats import Stats  # noqa: E402
from loaders.views import View  # noqa: E402

pytestmark = pytest.mark.dali

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SPEC = ViewSpec((View(64), View(40, interpolation="bicubic"), View(24, scale=(0.05, 0.14))))


def make_job(backend: Backend, index: list[int], epoch: int = 0, on_bad_sample: str = "raise") -> Job:
    """Job over the samples of `index`, with the draws of (0, epoch)."""
    options = {"epoch": epoch, "on_bad_sample": on_bad_sample}
    return Job(backend.reader, backend.spec, np.array(index), [], backend.stats, **options)


def open_backend(path: Path, spec: ViewSpec = SPEC, batch_size: int = 8, device: torch.device = CPU) -> Backend:
    return Backend(Reader(path), spec, batch_size=batch_size, device=device, workers=2, stats=Stats())


@pytest.fixture
def backend(beton: Path) -> Iterator[Backend]:
    """Over 48 images, in batches of up to 8."""
    backend = open_backend(beton)
    yield backend
    backend.close()


@pytest.fixture
def gpu_backend(beton: Path) -> Iterator[Backend]:
    if missing := Backend.missing(CUDA):
        pytest.skip(missing)
    backend = open_backend(beton, device=CUDA)
    yield backend
    backend.close()


def crops_of(backend: Backend, job: Job) -> list[torch.Tensor]:
    """The job's crops, made by themselves, on the host."""
    alone = dataclasses.replace(job)
    backend.start(alone).wait()
    return [c.cpu().clone() for c in alone.crops]


def assert_same(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    assert all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(a, b, strict=True))


# --- Where it runs ----------------------------------------------------------------------------------------------------


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Backend.missing(CPU) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in Backend.missing(CUDA)
    monkeypatch.setattr(dali, "__version__", "1.44.0")
    assert "1.44.0 is too old" in Backend.missing(CPU)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # importing it raises ImportError
    assert "pip install nvidia-dali-cuda130" in Backend.missing(CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_a_device_on_which_dali_cannot_run_is_a_user_error(beton: Path) -> None:
    with pytest.raises(UserError, match=r"DALI does not start on cuda:0, use --backend cpu: .*CUDA"):
        open_backend(beton, device=torch.device("cuda", 0))


# --- Pixels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [24, 300])
def test_no_pixel_outside_the_box_is_looked_at(tmp_path: Path, interpolation: str, size: int) -> None:
    path, pixels = tmp_path / "box.beton", np.full((120, 150, 3), 255, np.uint8)
    pixels[30:90, 40:110] = 0
    with Writer(path, 1) as writer:
        writer.add(pixels.tobytes(), 120, 150, 0, mode=MODE_RAW)
    backend = open_backend(path, ViewSpec((View(size, interpolation=interpolation),)))
    job = make_job(backend, [0])
    job.draws[0].box_B4[0] = (30, 40, 60, 70)
    backend.start(job).wait()
    assert job.crops[0].shape == (1, 3, size, size) and job.crops[0].max() == 0
    backend.close()


# --- Memory and order -------------------------------------------------------------------------------------------------


def test_kept_crops_do_not_change_while_others_are_made(beton: Path) -> None:
    backend, kept = open_backend(beton), []
    for epoch in range(3):
        jobs = [make_job(backend, list(range(i, i + 8)), epoch) for i in range(0, 48, 8)]
        under_way = [backend.start(job) for job in jobs]
        for pending, job in zip(under_way, jobs, strict=True):
            pending.wait()
            assert pending.done() and all(c.is_contiguous(memory_format=torch.channels_last) for c in job.crops)
            kept.append((job.crops, [c.clone() for c in job.crops]))
    addresses = {c.data_ptr() for crops, _ in kept for c in crops}
    assert len(addresses) == len(kept) * SPEC.K  # every one its own memory
    for _ in range(2):
        for crops, copies in kept:
            assert_same(crops, copies)
        backend.close()  # the second time round, the pipeline is gone
        gc.collect()


def test_crops_are_dalis_own_memory(backend: Backend) -> None:
    job = make_job(backend, [1, 2, 3])
    pending = backend.start(job)
    backend.collect()
    addresses = [outputs.data_ptr() for outputs in pending.outputs[:-1]]
    pending.wait()
    assert [c.data_ptr() for c in job.crops] == addresses


def test_batches_may_be_waited_for_in_any_order(backend: Backend) -> None:
    jobs = [make_job(backend, list(range(i, i + 8 - i // 8))) for i in range(0, 48, 8)]
    expected = [crops_of(backend, job) for job in jobs]
    under_way = [backend.start(job) for job in jobs]
    assert not any(pending.done() for pending in under_way)
    for i in (3, 0, 5, 4, 1, 2):
        under_way[i].wait()
        assert_same(jobs[i].crops, expected[i])


def test_opening_and_closing_with_work_under_way_leaks_no_memory(beton: Path) -> None:
    spec = ViewSpec((View(224),) * 4)

    def cycle() -> None:
        backend = open_backend(beton, spec, batch_size=48)  # 29 MB of crops a batch
        under_way = [backend.start(make_job(backend, list(range(48)), epoch)) for epoch in range(2)]
        under_way[0].wait()
        backend.close()

    def resident_megabytes() -> float:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    if not Path("/proc/self/statm").exists():
        pytest.skip("needs Linux' /proc")
    cycle()
    before = resident_megabytes()
    for _ in range(8):
        cycle()
    assert resident_megabytes() - before < 100  # a batch left behind each time would be 230


# --- Broken samples ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:replaced")
def test_an_error_stays_with_its_batch(tmp_path: Path) -> None:
    """Also if it comes while others are under way: pixels and boxes of those after it do not get mixed up."""
    path = write_beton(tmp_path / "data.beton", 48)
    whole = open_backend(path)
    expected = {i: [c[0] for c in crops_of(whole, make_job(whole, [i]))] for i in range(48)}
    whole.close()
    broken = [3, 17, 18, 23, 40]
    overwrite(path, *broken)
    backend, rng = open_backend(path), np.random.default_rng(0)
    batches = [rng.integers(0, 48, rng.integers(1, 9)).tolist() for _ in range(20)]
    jobs = [make_job(backend, batch, on_bad_sample="skip") for batch in batches]
    under_way = [backend.start(job) for job in jobs]
    for batch, pending, job in zip(batches, under_way, jobs, strict=True):
        pending.wait()
        assert job.index_B.tolist() == [next(j for j in range(i, 48) if j not in broken) for i in batch]
        for row, i in enumerate(job.index_B.tolist()):
            assert_same([c[row] for c in job.crops], expected[i])
    strict = make_job(backend, [0, 17, 1])
    pending = backend.start(strict)
    for _ in range(2):  # waiting again, as the loader does when it stops, raises again
        with pytest.raises(BadSample, match="sample 17 of") as caught:
            pending.wait()
        assert caught.value.index == 17 and not pending.done()
    backend.close()


def test_what_only_dali_refuses_is_decoded_here(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(backend, [4, 5, 6])
    expected, encoded = crops_of(backend, job), backend_module.encoded
    garbage = np.zeros(100, np.uint8)

    def refused(sample, *, as_pixels: bool = False) -> np.ndarray:
        return encoded(sample, as_pixels=True) if as_pixels else garbage

    monkeypatch.setattr(backend_module, "encoded", refused)
    backend.start(job).wait()
    assert_same(job.crops, expected)
    monkeypatch.setattr(backend_module, "encoded", lambda _sample, **_: garbage)
    with pytest.raises(RuntimeError, match=r"decoders\.image"):  # DALI's own words
        backend.start(make_job(backend, [4, 5, 6])).wait()


# --- GPU --------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_gpu_crops_are_safe_on_the_stream_that_waited(gpu_backend: Backend) -> None:
    """Used at once on a side stream, without a sync, while that stream lags behind and other batches are made."""
    jobs = [make_job(gpu_backend, list(range(i, i + 8))) for i in range(0, 48, 8)]
    expected = [crops_of(gpu_backend, job) for job in jobs]
    side, copies = torch.cuda.Stream(), []
    for _ in range(5):
        under_way = [gpu_backend.start(job) for job in jobs[:3]]
        with torch.cuda.stream(side):
            for i, job in enumerate(jobs):
                under_way[i].wait()
                torch.cuda._sleep(2_000_000)  # about a millisecond
                copies.append((i, [c.clone() for c in job.crops]))
                if i + 3 < len(jobs):
                    under_way.append(gpu_backend.start(jobs[i + 3]))
        side.synchronize()  # before the jobs, started again, let go of their crops
    for i, crops in copies:
        assert_same(crops, expected[i])
