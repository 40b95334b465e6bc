"""The machine: usable cores, free memory, and threads that compute side by side."""

from __future__ import annotations

import os
import resource
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the converter wants the number of cores, and no torch
    import torch


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers(device: torch.device) -> int:
    """All usable cores, less one for the training loop where a GPU does the computing."""
    return max(1, usable_cores() - 1) if device.type == "cuda" else usable_cores()


def thread_pool(num: int, name: str) -> ThreadPoolExecutor:
    """`num` threads, in each of which torch computes with that thread alone."""
    import torch

    # The calling thread's own setting is fixed first: a worker's changes the default for threads to come.
    torch.set_num_threads(torch.get_num_threads())
    return ThreadPoolExecutor(num, name, initializer=torch.set_num_threads, initargs=(1,))


def bytes_free(device: torch.device) -> int:
    """Free memory of the device, or of the host (what Linux says can be had without swapping)."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    try:
        line = next(x for x in Path("/proc/meminfo").read_text(encoding="ascii").splitlines() if "MemAvailable" in x)
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return 0  # unknown: `auto` will not take it


def peak_host_memory(pid: int | None = None) -> int:
    """The most memory that a process, this one unless given, has had resident, bytes; 0 where nothing tells."""
    try:  # Linux's ru_maxrss begins with the parent's peak; this does not
        status = Path(f"/proc/{pid or 'self'}/status").read_text(encoding="ascii")
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return peak if pid in (None, os.getpid()) else 0
