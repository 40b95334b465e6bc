"""Devices and number formats."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

from loaders.errors import UserError


def pick_device(name: str) -> torch.device:
    """The torch device for `auto`, `cpu` or `cuda`. Raises UserError for CUDA that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: torch finds no CUDA device here; check nvidia-smi and the torch build, or use --device cpu"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def cpu_has_bf16() -> bool:
    """True for a CPU that multiplies bf16 in hardware (AVX512-BF16 or AMX); on others bf16 is slower than fp32."""
    return any(
        getattr(torch.cpu, test, lambda: False)() for test in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )


@dataclass(frozen=True)
class Precision:
    """The number format of forward passes."""

    dtype: torch.dtype | None
    """Autocast type; None: fp32 without autocast."""
    scale: bool
    """Scale the loss, as gradients in fp16 need and those in bf16 do not."""

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        """The context that a forward pass runs in."""
        return torch.autocast(device.type, self.dtype) if self.dtype else contextlib.nullcontext()

    def __str__(self) -> str:
        names = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16 with loss scaling"}
        return names[self.dtype]


def pick_precision(name: str, device: torch.device) -> Precision:
    """bf16 where it is native, fp16 with loss scaling on older GPUs (Turing, sm_75), else fp32.

    Raises UserError for fp16 on a CPU, which torch's loss scaling and most kernels do not serve.
    """
    if name == "auto":
        if device.type == "cuda":
            # Turing emulates bf16, several times slower than fp16: ask for cards that have it in hardware.
            name = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
        else:
            name = "bf16" if cpu_has_bf16() else "fp32"
    if name == "fp16" and device.type != "cuda":
        raise UserError("--precision fp16 needs a GPU: use bf16 or fp32 on a CPU")
    return {
        "bf16": Precision(torch.bfloat16, False),
        "fp16": Precision(torch.float16, True),
        "fp32": Precision(None, False),
    }[name]


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 if it is in that (tests)."""
    return x if x.dtype == torch.float64 else x.float()
