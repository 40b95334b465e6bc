"""fastssl-eval NAME RUN_OR_WEIGHTS --data TRAIN.beton --val VAL.beton."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from fastssl import evaluate
from fastssl.cli import run_command
from fastssl.device import pick_device, pick_precision
from fastssl.evaluate.base import Evaluation, Results, Task, load_backbone
from fastssl.evaluate.recalibrate import recalibrated
from fastssl.networks.batch_norm import running_norms
from loaders.dataset import open_data
from loaders.errors import UserError


@dataclass(kw_only=True)
class Common:
    """Network and data"""

    weights: tyro.conf.Positional[Path]
    """Run folder, or a weights .safetensors file."""
    data: str = ""
    """Labelled training images (.beton)."""
    val: str = ""
    """Labelled images to classify (.beton)."""
    backbone: str | None = None
    """Architecture, for weights that do not name it: resnet18, vit-s16, timm/NAME, ..."""
    size: int | None = None
    """Side of the images given to the network, px. None: as in training."""
    random: bool = True
    """Evaluate the same network at random initialisation, too."""
    seed: int = 0
    """Seed of the random initialisation."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the network. auto: cuda if there is one."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Half precision, as in training."""
    workers: int | None = None
    """Decoding threads. None: by the machine."""
    recalibrate_bn: int = 0
    """Evaluate the weights also with BatchNorm statistics from this many of the --data images at --size, cropped as
    here (0: do not): those of training are of random crops or tiles."""
    json: Path | None = None
    """Write the results to this file, too."""


def evaluate_weights(common: Common, evaluation: Evaluation) -> dict[str, Results]:
    """Results of the "weights", of the "recalibrated" ones and at "random" initialisation, the last two if asked for.

    Raises UserError for input that cannot be used.
    """
    if not common.data or not common.val:
        raise UserError("give --data TRAIN.beton and --val VAL.beton: both with labels")
    train, val = open_data(common.data), open_data(common.val)
    device = pick_device(common.device)
    net, random_net, size = load_backbone(common.weights, common.backbone, common.size, common.seed)
    if common.recalibrate_bn and not running_norms(net):
        raise UserError("--recalibrate-bn: this network has no BatchNorm, leave it out")
    precision = pick_precision(common.precision, device)
    nets = {"weights": net.to(device).to(memory_format=torch.channels_last)}
    if common.recalibrate_bn:
        nets["recalibrated"] = recalibrated(
            net,
            train,
            size=size,
            device=device,
            images=common.recalibrate_bn,
            amp_dtype=precision.dtype,
            workers=common.workers,
        )
    if common.random:
        nets["random"] = random_net.to(device).to(memory_format=torch.channels_last)
    results = {}
    for which, candidate in nets.items():
        task = Task(candidate, train, val, size, device, precision, common.workers)
        evaluation.check(task)
        results[which] = evaluation.run(task)
    return results


def show(console: Console, title: str, results: dict[str, Results]) -> None:
    """One row per setting, one column per metric and network."""
    names = {"weights": "", "recalibrated": " (recalibrated)", "random": " (random init)"}
    table = Table(title=title, title_justify="left")
    table.add_column("setting")
    metrics = list(next(iter(results["weights"].values())))
    for which in results:
        for metric in metrics:
            table.add_column(metric + names[which], justify="right")
    for setting in results["weights"]:
        table.add_row(setting, *(f"{results[w][setting][m]:.2f}" for w in results for m in metrics))
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    """The console command. Returns the exit status."""

    def command(arguments: list[str]) -> int:
        names = ", ".join(evaluate.available())
        if not arguments or arguments[0] in ("-h", "--help"):
            print(
                f"usage: fastssl-eval NAME RUN_OR_WEIGHTS --data TRAIN.beton --val VAL.beton [OPTIONS]\n\nNAME: {names}"
            )
            print("\nfastssl-eval NAME --help shows the options of one evaluation.")
            return 0 if arguments else 2
        name, *flags = arguments
        kind = evaluate.load(name)
        made: type[Any] = dataclasses.make_dataclass(
            "Arguments", [("common", Common), ("options", kind, dataclasses.field(default_factory=kind))], kw_only=True
        )
        parsed = tyro.cli(
            made,
            prog=f"fastssl-eval {name}",
            description=" ".join((sys.modules[kind.__module__].__doc__ or "").split()),
            args=flags,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.PositionalRequiredArgs),
        )
        parsed.options.validate()
        results = evaluate_weights(parsed.common, parsed.options)
        show(Console(), f"{name}, {parsed.common.weights}, % of {parsed.common.val}", results)
        if parsed.common.json is not None:
            parsed.common.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        return 0

    return run_command("fastssl-eval", command, argv)


if __name__ == "__main__":
    sys.exit(main())
