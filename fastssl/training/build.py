"""The parts of a run: device, precision, data, views, method, loader, training step, each made once."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fastssl import methods, processes
from fastssl.config import schema as configs
from fastssl.config.schema import RunConfig
from fastssl.device import pick_device, pick_precision
from fastssl.methods.base import Method
from fastssl.networks.activation_checkpointing import checkpoint_activations
from fastssl.networks.backbones import backbone, check_size
from fastssl.networks.batch_norm import group_batch_norm, need_batch_norm_groups, running_norms
from fastssl.processes import World
from fastssl.progress import Progress
from fastssl.training.step import Step
from loaders import Loader, ViewSpec
from loaders.dataset import open_data
from loaders.errors import UserError
from loaders.views import RECIPES


def join(config: RunConfig) -> tuple[torch.device, World]:
    """Join the other processes of the run, if there are any. Returns this process's device and place among them."""
    configs.validate(config)
    device = pick_device(config.run.device)
    world = processes.init(device.type)
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device, world


class Setup:
    """The parts of a run, each made once. Making them writes nothing.

    The views, and the loader with them, change where `--size-schedule` says so. device, world: from `join`. backend:
    the loader's, in place of --backend. Raises UserError for whatever is wrong with the input.
    """

    def __init__(self, config: RunConfig, device: torch.device, world: World, backend: str | None = None):
        self.config, self.device, self.world = config, device, world
        self.on_gpu = device.type == "cuda"
        self.precision = pick_precision(config.run.precision, device)
        if config.data.batch_size % world.size:
            raise UserError(
                f"--batch-size {config.data.batch_size} does not divide among {world.size} processes: "
                f"use a multiple of {world.size}"
            )
        config.method_options.check_batch(config.data.batch_size // world.size)
        self.reader = open_data(config.data.data)
        self.val_reader = open_data(config.data.val) if config.data.val else None
        if self.val_reader is not None and config.run.knn_k > min(len(self.reader), config.run.knn_bank):
            raise UserError(f"--knn-k {config.run.knn_k} neighbours asked of {len(self.reader)} images: use fewer")
        self.spec = make_views(config, configs.size_at(config, 0))
        self.method = make_method(config)
        self.loader = self._open_loader(backend or config.data.backend)
        self.step = Step(config, place(self.method, device), device, self.precision, world)

    def _open_loader(self, backend: str) -> Loader:
        data, world = self.config.data, self.world
        with processes.main_first(world):  # measuring undisturbed, and all processes with one result
            return Loader(
                self.reader,
                self.spec,
                batch_size=data.batch_size // world.size,
                device=self.device,
                backend=backend,
                seed=self.config.run.seed,
                rank=world.rank,
                world=world.size,
                workers=data.workers,
                prefetch=data.prefetch,
                order=data.order,
                page_window=data.page_window,
                dtype=self.precision.dtype or torch.float32,
                on_bad_sample=data.on_bad_sample,
                views_ahead=self.config.run.micro_batch is None,  # else batches are large, and memory is scarce
            )

    def change_views(self, spec: ViewSpec) -> None:
        """Replace the loader by one that makes other views with the same backend."""
        self.loader.close()
        self.spec = spec
        self.loader = self._open_loader(self.loader.backend.name)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in an epoch."""
        return len(self.loader)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run; --max-steps ends it early."""
        total = self.config.optim.epochs * self.steps_per_epoch
        return min(total, self.config.run.max_steps or total)

    def progress(self, steps_done: int) -> Progress:
        """The position of the run after so many steps."""
        return Progress(steps_done, self.config.optim.epochs * self.steps_per_epoch, self.steps_per_epoch)

    def wait(self) -> None:
        """Wait until the device has done everything that it was asked for."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def __enter__(self) -> Setup:
        return self

    def __exit__(self, *exc: object) -> None:
        """Stop the loader's threads."""
        self.loader.close()


def make_views(config: RunConfig, size: int | None = None) -> ViewSpec:
    """The views that the method asks for, made by the recipe with the configuration's changes to crop and blur.

    size: side of the large views, px; None: --size.
    """
    data = config.data

    def recipe(num_views: int) -> ViewSpec:
        spec = RECIPES[data.recipe](num_views, size or data.size)
        changes: dict[str, Any] = {}
        if data.crop_min is not None:
            changes["scale"] = (data.crop_min, 1.0)
        if data.interpolation is not None:
            changes["interpolation"] = data.interpolation
        if data.blur is not None:
            changes["blur_p"] = data.blur
        return dataclasses.replace(spec, views=tuple(dataclasses.replace(v, **changes) for v in spec.views))

    return config.method_options.views(recipe)


def make_method(config: RunConfig) -> Method:
    """Backbone and heads, freshly initialised from the run's seed, on the host.

    Raises UserError for an unknown backbone or one that does not take images of the sizes of the method's views.
    """
    model, spec = config.model, make_views(config)
    torch.manual_seed(config.run.seed)
    net, width = backbone(
        model.backbone,
        size=config.data.size,
        zero_init_residual=model.zero_init_residual,
        drop_path=model.drop_path,
    )
    specs = [spec, *(make_views(config, size) for size in config.data.size_schedule)]
    sizes = {size // divide for spec in specs for size in spec.sizes for divide in (1, spec.divide)}
    for size in sizes - {config.data.size}:
        check_size(model.backbone, net, size, "this method's small views or tiles")
    config.method_options.check_network(net, config.data.size)
    if config.run.recalibrate_bn and not running_norms(net):
        raise UserError(f"--recalibrate-bn: {model.backbone} has no BatchNorm, leave it out")
    if model.activation_checkpointing:
        checkpoint_activations(net, model.backbone)
    method: Method = methods.load(config.model.method).Method(net, width, config.method_options)
    joint = model.bn_statistics == "joint"
    if joint or model.sync_bn:
        need_batch_norm_groups(method, "--sync-bn" if model.sync_bn else "--bn-statistics joint")
    group_batch_norm(method, joint=joint, sync=model.sync_bn)
    return method


def place(method: Method, device: torch.device) -> Method:
    """Move a method to the device, in the memory format of its views."""
    return method.to(device).to(memory_format=torch.channels_last)
