"""What a run is built from: device, precision, network, method, views."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass

import torch
from torch import nn

from fastssl import methods
from fastssl.activation_checkpointing import checkpoint_activations
from fastssl.backbones import backbone, check_size
from fastssl.config import Config
from fastssl.nn import group_batch_norm, need_plain_batch_norm
from fastssl.recalibrate import has_batch_norm
from loaders import ViewSpec
from loaders.errors import UserError
from loaders.views import RECIPES


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
    """Whether this CPU multiplies bf16 in hardware (AVX512-BF16 or AMX); without it bf16 is slower than fp32."""
    return any(
        getattr(torch.cpu, test, lambda: False)() for test in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )


@dataclass(frozen=True)
class Precision:
    """Autocast type (None: fp32) and whether gradients need scaling, which fp16 does and bf16 does not."""

    dtype: torch.dtype | None
    scale: bool

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
            # bf16 "works" on Turing by emulation, several times slower than fp16: ask for the real thing.
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


def make_views(config: Config, size: int | None = None) -> ViewSpec:
    """The views that the method asks for, made by the recipe with the configuration's changes to crop and blur.

    size: of the large views, px, where it is not --size.
    """
    data, size = config.data, size or config.data.size

    def recipe(num_views: int) -> ViewSpec:
        spec = RECIPES[data.recipe](num_views, size)
        changes: dict[str, object] = {}
        if data.crop_min is not None:
            changes["scale"] = (data.crop_min, 1.0)
        if data.blur is not None:
            changes["blur_p"] = data.blur
        return dataclasses.replace(spec, views=tuple(dataclasses.replace(v, **changes) for v in spec.views))

    return methods.load(config.model.method).views(config.method_options, recipe)


def make_method(config: Config) -> nn.Module:
    """Backbone and heads, freshly initialised from the run's seed, on the host.

    Raises UserError for an unknown backbone or one that does not take images of the sizes of the method's views.
    """
    model, spec = config.model, make_views(config)
    torch.manual_seed(config.run.seed)
    options = {"zero_init_residual": model.zero_init_residual, "drop_path": model.drop_path}
    net, width = backbone(model.backbone, size=config.data.size, **options)
    specs = [spec, *(make_views(config, size) for size in config.data.size_schedule)]
    sizes = {size // divide for spec in specs for size in spec.sizes for divide in (1, spec.divide)}
    for size in sizes - {config.data.size}:
        check_size(model.backbone, net, size, "this method's small views or tiles")
    if hasattr(config.method_options, "check_network"):
        config.method_options.check_network(net, config.data.size)
    if config.run.recalibrate_bn and not has_batch_norm(net):
        raise UserError(f"--recalibrate-bn: {model.backbone} has no BatchNorm, leave it out")
    if model.activation_checkpointing:
        checkpoint_activations(net, model.backbone)
    method = methods.load(config.model.method).Method(net, width, config.method_options)
    joint = model.bn_statistics == "joint"
    if joint or model.sync_bn:
        need_plain_batch_norm(method, "--sync-bn" if model.sync_bn else "--bn-statistics joint")
    return group_batch_norm(method, joint=joint, sync=model.sync_bn)
