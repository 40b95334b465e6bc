"""What a run is built from: device, precision, network, method, views."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from fastssl import methods
from fastssl.config.schema import RunConfig
from fastssl.networks.activation_checkpointing import checkpoint_activations
from fastssl.networks.backbones import backbone, check_size
from fastssl.networks.batch_norm import group_batch_norm, need_batch_norm_groups, running_norms
from loaders import ViewSpec
from loaders.errors import UserError
from loaders.views import RECIPES


def make_views(config: RunConfig, size: int | None = None) -> ViewSpec:
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

    return config.method_options.views(recipe)


def make_method(config: RunConfig) -> nn.Module:
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
    config.method_options.check_network(net, config.data.size)
    if config.run.recalibrate_bn and not running_norms(net):
        raise UserError(f"--recalibrate-bn: {model.backbone} has no BatchNorm, leave it out")
    if model.activation_checkpointing:
        checkpoint_activations(net, model.backbone)
    method = methods.load(config.model.method).Method(net, width, config.method_options)
    joint = model.bn_statistics == "joint"
    if joint or model.sync_bn:
        need_batch_norm_groups(method, "--sync-bn" if model.sync_bn else "--bn-statistics joint")
    return group_batch_norm(method, joint=joint, sync=model.sync_bn)
