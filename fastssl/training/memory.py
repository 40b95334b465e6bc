"""Memory of a training step, part by part, and the largest micro-batch that fits."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fastssl.config.schema import RunConfig
from fastssl.methods.base import Metrics
from fastssl.networks.micro_batch import use_micro_batches
from fastssl.progress import Progress
from fastssl.training.build import make_views
from fastssl.training.step import Step
from loaders import Batch, Loader
from loaders.errors import UserError
from loaders.machine import bytes_free, peak_host_memory

_SHARE = 0.95  # share of the memory that a step may use; the rest is lost between the allocator's blocks
_OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED")  # torch's own error, and that of CUDA's libraries


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Memory of a training step in one process, bytes, part by part."""

    weights: int
    """Parameters and buffers, momentum networks apart."""
    momentum: int
    """Momentum networks: parts of the method without anything to train."""
    gradients: int
    optimiser: int
    activations: int
    """The most that the forward pass keeps for the backward pass, with micro-batches that of one micro-batch. Blocks
    that are computed again count with their input. Copies of the weights in half precision are counted here."""
    views: int
    """Views of all batches that are being trained on, ready, or being made."""
    loader: int
    """Crops before augmentation and decoded images, on the host or (backends resident and dali) on the GPU."""
    peak: int | None
    """The most that was allocated on the GPU in a step; None on a CPU."""

    @property
    def total(self) -> int:
        """The GPU's peak; on a CPU the sum of all parts but the loader's."""
        values = dataclasses.asdict(self)
        return values.pop("peak") or sum(values.values()) - self.loader

    def __str__(self) -> str:
        gigabytes = {name: (value or 0) / 1e9 for name, value in dataclasses.asdict(self).items()}
        peak = gigabytes.pop("peak")
        parts = [f"{name} {value:.3g}" for name, value in gigabytes.items() if value or name != "momentum"]
        return f"{', '.join(parts)} GB" + (f"; peak {peak:.3g} GB" if peak else "")


def measured_step(
    step: Step, batch: Batch, progress: Progress, loader: Loader | None = None
) -> tuple[tuple[Tensor, Metrics], StepMemory]:
    """Take a step and count its memory. Returns the result of `step(batch, progress)` and the memory.

    Counting does not change the result, and waits for nothing. Without `loader` only the batch's own views count.
    """
    method, on_gpu = step.method, step.device.type == "cuda"
    before = _bytes(_tensors(step.optimizer.state))
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(step.device)
    views = [*batch.views, *(batch.tiles or [])]
    with (activations := Activations([*method.parameters(), *method.buffers(), *views])):
        result = step(batch, progress)
    momentum = [m for m in method.children() if _is_momentum(m)]
    apart = sum(_bytes(m.state_dict().values()) for m in momentum)
    optimiser = _bytes(_tensors(step.optimizer.state))
    # The first step makes the optimiser's state at its end, later steps have it all the time.
    peak = torch.cuda.max_memory_allocated(step.device) + optimiser - before if on_gpu else None
    held = loader.memory() if loader else None
    return result, StepMemory(
        weights=_bytes([*method.parameters(), *method.buffers()]) - apart,
        momentum=apart,
        gradients=_bytes(p for p in method.parameters() if p.requires_grad),
        optimiser=optimiser,
        activations=activations.peak,
        views=_bytes(views) * (held.batches if held else 1),
        loader=held.crops + held.decoded if held else 0,
        peak=peak,
    )


class Activations(saved_tensors_hooks):
    """Bytes that autograd keeps for the backward passes of a `with` block, `now` and at the `peak`.

    Tensors that share memory count once; the memory of the tensors `known` does not count.
    """

    def __init__(self, known: Iterable[Tensor]):
        super().__init__(self._keep, lambda kept: kept.tensor)
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._uses: Counter[int] = Counter()  # by storage

    def _keep(self, tensor: Tensor) -> _Kept:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            if not self._uses[storage.data_ptr()]:
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
            self._uses[storage.data_ptr()] += 1
        return _Kept(self, tensor.detach())

    def _release(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._uses[storage.data_ptr()] -= 1
            if not self._uses[storage.data_ptr()]:
                self.now -= storage.nbytes()


class _Kept:
    """A tensor that autograd keeps. Autograd drops this object when the backward pass is over."""

    def __init__(self, owner: Activations, tensor: Tensor):
        self.owner, self.tensor = owner, tensor

    def __del__(self) -> None:
        self.owner._release(self.tensor)


def _is_momentum(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _tensors(state: dict) -> Iterable[Tensor]:
    """The tensors in an optimiser's state."""
    return (value for values in state.values() for value in values.values() if isinstance(value, Tensor))


def peak_memory(device: torch.device) -> int:
    """The most memory that this process has used so far, bytes: on the GPU, or resident on the host."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_host_memory()


# ------------------------------------------------------------------ out of memory


@contextlib.contextmanager
def advice(config: RunConfig) -> Iterator[None]:
    """Turn running out of memory into advice: for the loader and the monitor. A step's own is `out_of_memory`."""
    data = config.data
    try:
        yield
    except torch.OutOfMemoryError as error:
        more = "" if config.run.micro_batch else ", or --micro-batch, with which no views wait on the GPU"
        raise UserError(
            f"out of GPU memory beside the training step, with --batch-size {data.batch_size} and "
            f"{make_views(config).K} views of {data.size} px: try a smaller --prefetch or --batch-size{more}"
        ) from error


def out_of_memory(step: Step, batch: Batch, progress: Progress, error: torch.OutOfMemoryError) -> UserError:
    """The error to raise after `step(batch, progress)` ran out of memory: it names the largest micro-batch that fits.

    The search trains on the batch, so weights and optimiser are of no use afterwards.
    """
    traceback.clear_frames(error.__traceback__)  # the frames hold what the step had allocated
    config, sides = step.config, sorted({x.shape[-1] for x in batch.views}, reverse=True)
    images = config.run.micro_batch
    what = (
        f"out of GPU memory ({_room(step.device) / 1e9:.1f} GB) with --batch-size {config.data.batch_size}"
        f"{f', --micro-batch {images}' if images else ''} and {len(batch.views)} views of "
        f"{' and '.join(str(side) for side in sides)} px"
    )
    if step.world.size > 1:  # processes do not run out of memory together, and would wait for each other in a search
        smaller = max(2, (images or len(batch.index)) // 2)
        return UserError(f"{what} in one of {step.world.size} processes: try --micro-batch {smaller}")
    try:
        fits = largest_micro_batch(step, batch, progress)
    except UserError as refused:
        return UserError(f"{what}: use a smaller --batch-size, or --activation-checkpointing ({refused})")
    if fits is None:
        less = "" if config.model.activation_checkpointing else "add --activation-checkpointing, or "
        return UserError(
            f"{what}, and the smallest micro-batch does not fit either: {less}use a smaller --size, "
            "--backbone or --batch-size"
        )
    return UserError(
        f"{what}: {'use' if images else 'add'} --micro-batch {fits}, the largest that fits (same loss as the big batch "
        f"with BatchNorm over groups of {fits})"
    )


def largest_micro_batch(step: Step, batch: Batch, progress: Progress) -> int | None:
    """The largest --micro-batch with which this batch fits into the device's memory; None if none does.

    Every image adds the same amount of memory, which steps with two small micro-batches show. Then the largest divisor
    of the batch that should fit is tried, and smaller ones if it does not. Weights and optimiser are of no use
    afterwards. Raises UserError for a network that cannot be trained in micro-batches.
    """
    num, room = len(batch.index), _SHARE * _room(step.device)

    def used(images: int) -> float:
        return _used(step, batch, progress, images)

    divisors = [n for n in range(2, num // 2 + 1) if num % n == 0]
    if not divisors or (least := used(divisors[0])) > room:
        return None
    if len(divisors) > 1 and (more := used(divisors[1])) <= room:
        per_image = (more - least) / (divisors[1] - divisors[0])
        for images in reversed(divisors[1:]):
            if least + per_image * (images - divisors[0]) <= room and used(images) <= room:
                return images
    return divisors[0]


def _used(step: Step, batch: Batch, progress: Progress, images: int) -> float:
    """Bytes that a step in micro-batches of `images` takes; infinite if the device has less."""
    step.micro = use_micro_batches(step.method, step.method.image_networks(), images)
    try:
        return measured_step(step, batch, progress)[1].total
    except RuntimeError as error:
        if not any(words in str(error) for words in _OUT_OF_MEMORY):
            raise
        traceback.clear_frames(error.__traceback__)
        return math.inf
    finally:
        step.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if step.device.type == "cuda":
            torch.cuda.empty_cache()


def _room(device: torch.device) -> int:
    """Bytes that this process can use: those in its possession, and the free ones."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return bytes_free(device)
