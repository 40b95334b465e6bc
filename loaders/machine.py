"""What this machine has: usable cores, free memory."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch


def default_workers(device: torch.device) -> int:
    """All usable cores, less one for the training loop where a GPU does the computing."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores - 1) if device.type == "cuda" else cores


def bytes_free(device: torch.device) -> int:
    """Free memory of the device, or of the host (what Linux says can be had without swapping)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        line = next(x for x in Path("/proc/meminfo").read_text(encoding="ascii").splitlines() if "MemAvailable" in x)
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return 0  # unknown: `auto` will not take it


def peak_host_memory(pid: int | None = None) -> int:
    """The most memory that a process (None: this one) has had resident, bytes."""
    try:  # Linux's ru_maxrss begins with the parent's peak; this figure does not
        status = Path(f"/proc/{pid or 'self'}/status").read_text(encoding="ascii")
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        if pid is not None:
            raise
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
