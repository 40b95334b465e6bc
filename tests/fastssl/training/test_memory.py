"""Memory by parts, and what is said when it is not enough."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small import SMALL, batch_of, config_of
from torch import Tensor, nn
from torchvision.models import ResNet

from fastssl.device import pick_precision
from fastssl.processes import World
from fastssl.progress import Progress
from fastssl.train import main
from fastssl.training import log as logs
from fastssl.training import memory
from fastssl.training.build import make_method, make_views, place
from fastssl.training.memory import Activations, StepMemory, largest_micro_batch, measured_step, out_of_memory
from fastssl.training.step import Step
from loaders import Batch, Loader
from loaders.beton import Reader
from loaders.errors import UserError

B, CPU, FIRST = 8, torch.device("cpu"), Progress(0, 2, 1)
OUT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def made(name: str = "simsiam", device: torch.device = CPU, images: int = B, **changes: object) -> tuple[Step, Batch]:
    """A step of a small run with ResNet-18, and a batch for it. `changes`: of the configuration's fields."""
    config = config_of(name)
    config.data.batch_size, config.run.precision, config.run.compile = images, "fp32", "off"
    for group in (config.data, config.model, config.optim, config.run):
        for field, value in changes.items():
            if hasattr(group, field):
                setattr(group, field, value)
    batch = batch_of(make_views(config), images)
    batch.views = [view.to(device) for view in batch.views]
    precision = pick_precision("fp32", device)
    return Step(config, place(make_method(config), device), device, precision), batch


def bytes_of(*modules: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for m in modules for t in m.state_dict().values())


# ------------------------------------------------------------------ counting


def test_activations_are_counted_once_and_given_back() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(3, 8)
    with (counted := Activations([*net.parameters(), x])):
        y = net(x)
        hidden = 3 * 16 * 4  # the ReLU's output, which the second layer keeps, too; x and the weights are known
        assert counted.now == hidden
        loss = y.square().sum()
        assert counted.now == counted.peak == hidden + 3 * 4 * 4
        loss.backward()
        assert counted.now == 0
        first, second = net(x), net(x)
        assert counted.now == counted.peak == 2 * hidden
        del first
        assert counted.now == hidden
        second.sum().backward()
    assert (counted.now, counted.peak) == (0, 2 * hidden)
    with (everything := Activations([])):
        net(x).sum()
    weights = 16 * 4 * 4  # the second layer's, of which x.T is not asked; the first one has no gradient for x
    assert everything.peak == hidden + x.nbytes + weights


@pytest.mark.usefixtures("tiny")
def test_gradients_are_what_they_are_without_counting() -> None:
    step, batch = made()
    other, _ = made()
    for i in range(2):
        (loss, metrics), _ = measured_step(step, batch, Progress(i, 2, 1))
        expected, expected_metrics = other(batch, Progress(i, 2, 1))
        assert torch.equal(loss, expected) and metrics == expected_metrics
    state = other.method.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in step.method.state_dict().items())


@pytest.mark.parametrize(("optimizer", "states"), [("sgd", 1), ("adamw", 2)])
def test_parts_of_a_step(optimizer: str, states: int) -> None:
    step, batch = made("byol", optimizer=optimizer)
    for i in range(2):
        _, parts = measured_step(step, batch, Progress(i, 2, 1))
        online = step.method.backbone, step.method.projector, step.method.predictor
        target = step.method.target_backbone, step.method.target_projector
        assert (parts.weights, parts.momentum) == (bytes_of(*online), bytes_of(*target))
        assert parts.gradients == sum(4 * p.numel() for m in online for p in m.parameters())
        assert 0 <= parts.optimiser - states * parts.gradients <= 4 * len(list(step.method.parameters()))
        assert parts.views == sum(view.nbytes for view in batch.views)
        assert (parts.loader, parts.peak) == (0, None)
        assert parts.total == sum(v or 0 for v in dataclasses.asdict(parts).values())


def activations(**changes: object) -> int:
    return measured_step(*made(**changes), FIRST)[1].activations


def test_activations_grow_with_the_images_and_shrink_by_what_is_for_it() -> None:
    whole = activations()
    assert activations(images=2 * B) == pytest.approx(2 * whole, rel=0.05)
    assert activations(micro_batch=2) < 0.4 * whole
    assert activations(activation_checkpointing=True) < 0.6 * whole


@pytest.mark.parametrize("backend", ["cpu", "resident"])
def test_what_the_loader_keeps(backend: str, beton: Path) -> None:
    step, _ = made(images=4)
    reader = Reader(beton)
    with Loader(reader, make_views(step.config), batch_size=4, backend=backend, prefetch=2, workers=1) as loader:
        batches = loader.epoch(0)
        _, parts = measured_step(step, next(batches), FIRST, loader)
        batches.close()
    pixels = 2 * 4 * 3 * 32 * 32  # of K views
    assert parts.views == 3 * 4 * pixels  # two batches ahead and the one in use, four bytes per value
    decoded = 3 * int((reader.height * reader.width).sum()) if backend == "resident" else 0
    assert parts.loader == 3 * pixels + decoded


def test_parts_are_one_line() -> None:
    parts = StepMemory(
        weights=180_000_000, momentum=0, gradients=90_000_000, optimiser=91_234_567, activations=3_100_000_000,
        views=310_000_000, loader=400_000_000, peak=None,
    )  # fmt: skip
    line = "weights 0.18, gradients 0.09, optimiser 0.0912, activations 3.1, views 0.31, loader 0.4 GB"
    assert str(parts) == line
    more = dataclasses.replace(parts, momentum=100_000_000, peak=4_100_000_000)
    assert str(more) == line.replace("0.18,", "0.18, momentum 0.1,") + "; peak 4.1 GB"
    assert (more.total, parts.total) == (4_100_000_000, 3_771_234_567)


# ------------------------------------------------------------------ out of memory


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets how many bytes the device has."""
    return lambda value: monkeypatch.setattr(memory, "_room", lambda _device: value / memory._SHARE)


def curve(fits: int, per_image: float = 10, fixed: float = 100) -> Callable[..., float]:
    """Memory of a device whose memory ends behind `fits` images."""
    return lambda _step, _batch, _progress, images: fixed + per_image * images if images <= fits else math.inf


@pytest.mark.parametrize(
    ("images", "bytes", "used", "largest"),
    [
        (512, 100 + 10 * 64, curve(512), 64),
        (512, 100 + 10 * 64 - 1, curve(512), 32),
        (512, 1e9, curve(512), 256),  # the whole batch is no micro-batch
        (512, 1e9, curve(16), 16),  # less fits than the small ones let hope
        (512, 1e9, curve(2), 2),
        (512, 1e9, curve(1), None),
        (512, 119, curve(512), None),
        (512, 120, curve(512), 2),
        (96, 100 + 10 * 30, curve(512), 24),
        (9, 1e9, curve(512), 3),
        (7, 1e9, curve(512), None),
        (512, 1000, curve(512, per_image=0), 256),
        (512, 1000, lambda *a: 100 + a[3] ** 2, 16),  # more for each than the small ones let hope
    ],
)
def test_the_largest_divisor_that_fits(
    images: int, bytes: float, used: Callable, largest: int | None, room: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    room(bytes)
    monkeypatch.setattr(memory, "_used", used)
    batch = Batch([], None, torch.arange(images), torch.arange(images))
    assert largest_micro_batch(SimpleNamespace(device=CPU), batch, FIRST) == largest


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", ["simsiam", "dino"])
def test_it_is_found_by_training(name: str, room: Callable) -> None:
    """What a run with that micro-batch takes fits, and what one with the next larger one takes does not."""
    used = {n: measured_step(*made(name, micro_batch=n), FIRST)[1].total for n in (2, 4)}
    assert used[2] < used[4]
    for limit, expected in ((used[4], 4), (used[4] - 1, 2), (used[2] - 1, None)):
        room(limit)
        step, batch = made(name)
        step(batch, FIRST)  # makes the optimiser's state
        assert largest_micro_batch(step, batch, FIRST) == expected


def breaks_above(rows: int, error: Exception = OUT) -> Callable[[ResNet, Tensor], Tensor]:
    """A ResNet's `forward` that cannot train on more images than `rows` at a time."""

    def forward(self: ResNet, x: Tensor) -> Tensor:
        if len(x) > rows and self.training and torch.is_grad_enabled():
            raise error
        return self._forward_impl(x)

    return forward


@pytest.mark.usefixtures("tiny")
def test_other_errors_are_not_taken_for_it(room: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    room(1e12)
    step, batch = made()
    monkeypatch.setattr(ResNet, "forward", breaks_above(4, RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")))
    assert largest_micro_batch(step, batch, FIRST) == 2
    monkeypatch.setattr(ResNet, "forward", breaks_above(0, RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        largest_micro_batch(step, batch, FIRST)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "use a smaller --size, --backbone or --batch-size"),
        ({"micro_batch": 4}, "--batch-size 8, --micro-batch 4 and 2 views of 32 px, and the smallest micro-batch"),
        ({}, "add --activation-checkpointing, or use a smaller --size"),
        ({"activation_checkpointing": True}, "does not fit either: use a smaller --size"),
    ],
)
def test_what_is_said_if_nothing_fits(changes: dict, message: str, room: Callable) -> None:
    room(1e6)
    assert message in str(out_of_memory(*made(**changes), FIRST, OUT))


def test_a_network_without_micro_batches(room: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise UserError("its BatchNorm does more")

    room(1e6)
    step, batch = made()
    monkeypatch.setattr("fastssl.networks.micro_batch.need_batch_norm_groups", refuse)
    said = str(out_of_memory(step, batch, FIRST, OUT))
    assert "px: use a smaller --batch-size, or --activation-checkpointing (its BatchNorm does more)" in said


def test_processes_try_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    step, batch = made()
    step.world = World(0, 2, 0)
    monkeypatch.delattr(memory, "largest_micro_batch")
    assert "in one of 2 processes: try --micro-batch 4" in str(out_of_memory(step, batch, FIRST, OUT))


# ------------------------------------------------------------------ the program


def run(beton: Path, folder: Path, *more: object) -> int:
    arguments = ["--data", beton, "--out", folder, "--method", "simsiam", *SMALL, "--epochs", 1, "--max-steps", 2]
    return main([str(a) for a in (*arguments, *more)])


@pytest.mark.usefixtures("tiny")
def test_a_run_says_what_it_needs(beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(beton, tmp_path / "run") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory: weights ")]
    (entry,) = [e for e in logs.read_metrics(tmp_path / "run" / logs.METRICS) if "memory_bytes" in e]
    assert lines == [f"memory: {StepMemory(**entry['memory_bytes'])}"] and entry["step"] == 1


@pytest.mark.usefixtures("tiny")
def test_the_advice_after_running_out_of_memory_works(
    beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, room: Callable
) -> None:
    room(9.5e9)
    monkeypatch.setattr(ResNet, "forward", breaks_above(8))
    assert run(beton, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error == (
        "fastssl-train: error: out of GPU memory (10.0 GB) with --batch-size 8 and 2 views of 32 px: add --micro-batch "
        "4, the largest that fits (same loss as the big batch with BatchNorm over groups of 4)\n"
    )
    assert run(beton, tmp_path / "run", "--overwrite", "--micro-batch", 4) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_on_a_gpu_the_advice_is_right(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that is made small: the batch does not fit, the micro-batch named does, and twice as many do not."""
    device = torch.device("cuda", torch.cuda.current_device())
    total = torch.cuda.get_device_properties(device).total_memory
    limit = 10**9
    changes = {"device": device, "images": 1024, "size": 96, "activation_checkpointing": checkpointing}
    monkeypatch.setattr(memory, "_room", lambda _device: limit)
    torch.cuda.set_per_process_memory_fraction(limit / total, device)
    try:
        step, batch = made(**changes)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            step(batch, FIRST)
        message = str(out_of_memory(step, batch, FIRST, caught.value))
        images = int(message.split("--micro-batch ")[1].split(",")[0])
        del step, caught
        torch.cuda.empty_cache()
        _, parts = measured_step(*made(**changes, micro_batch=images), FIRST)
        assert parts.activations < parts.peak <= memory._SHARE * limit
        torch.cuda.empty_cache()
        try:
            _, parts = measured_step(*made(**changes, micro_batch=2 * images), FIRST)
            assert parts.peak > memory._SHARE * limit
        except torch.OutOfMemoryError:
            pass
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


@pytest.mark.gpu
def test_on_a_gpu_the_peak_is_the_allocators() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    step, batch = made(device=device, images=64, size=64)
    _, first = measured_step(step, batch, FIRST)
    _, second = measured_step(step, batch, FIRST)
    assert second.peak == torch.cuda.max_memory_allocated(device)
    kept = second.weights + second.optimiser + second.activations + second.views
    assert kept < second.peak and first.peak == pytest.approx(second.peak, rel=0.1)
