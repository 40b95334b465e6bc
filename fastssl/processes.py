"""Data-parallel runs through torchrun. A single process needs no process group."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from loaders.errors import UserError


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def main(self) -> bool:
        """True in the process that writes files and talks to the user."""
        return self.rank == 0


def init(device_type: str) -> World:
    """Join the process group that torchrun describes in the environment, with nccl on CUDA and gloo on CPUs."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World()
    world = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"]))
    if device_type == "cuda":
        if world.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {world.local_rank} of this machine has no GPU ({torch.cuda.device_count()} are here): "
                f"use torchrun --nproc-per-node {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(world.local_rank)
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    return world


def barrier(world: World) -> None:
    """Wait for the other processes, if there are any."""
    if world.size > 1:
        dist.barrier()


def any_process(world: World, flag: bool) -> bool:
    """True if `flag` is set in any process. All processes have to call this."""
    if world.size == 1:
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return bool(sum_over_processes(torch.tensor(float(flag), device=device)))


@contextlib.contextmanager
def main_first(world: World) -> Iterator[None]:
    """Let the main process go through the block alone, then the others."""
    if not world.main:
        barrier(world)
    yield
    if world.main:
        barrier(world)


def finish(world: World) -> None:
    """Leave the process group."""
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


# ------------------------------------------------------------------ tensors of all processes


def size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


@torch.no_grad()
def gather(x: Tensor) -> Tensor:
    """The rows of all processes, [N, ...] from [B, ...] each, in their order, without gradient."""
    if size() == 1:
        return x.detach()
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        return gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # Every process's loss depends on these rows: their gradients add up.
        grad = sum_over_processes(grad.contiguous())
        return grad[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def gather_with_grad(x: Tensor) -> Tensor:
    """`gather` with gradients: each row's, summed over all processes' losses, flow back to the process it is from."""
    return x if size() == 1 else _GatherWithGrad.apply(x)


@torch.no_grad()
def sum_over_processes(x: Tensor) -> Tensor:
    """The sum of every process's `x`, without gradient."""
    if size() == 1:
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x


def mean_over_processes(x: Tensor) -> Tensor:
    """The mean of every process's `x`, without gradient."""
    return sum_over_processes(x) / size()


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every gradient by its mean over the processes, in one message for each type."""
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for p in parameters:
        if p.grad is not None:
            by_type.setdefault(p.grad.dtype, []).append(p.grad)
    for grads in by_type.values():
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= size()
        means = flat.split([g.numel() for g in grads])
        torch._foreach_copy_(grads, [mean.view_as(g) for mean, g in zip(means, grads, strict=True)])


def own_rows(num: int, device: torch.device) -> Tensor:
    """Positions of this process's `num` rows among the gathered ones, [B] int64."""
    return torch.arange(num, device=device) + rank() * num


def same_permutation(num: int, device: torch.device) -> Tensor:
    """A random permutation of 0..num-1 from torch's generator, the first process's in all of them."""
    order = torch.randperm(num, device=device)
    if size() > 1:
        dist.broadcast(order, 0)
    return order
