"""Parsing of the command line of fastssl-train: a preset or a resumed run first, then flags over it."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import tyro

from fastssl.config import presets
from fastssl.config import schema as configs
from fastssl.config.schema import RunConfig
from loaders.errors import UserError

# What --resume may change: how a run is carried out, not what it computes.
RESUMABLE = {
    "data": {"data", "val", "backend", "workers", "prefetch", "on_bad_sample"},
    "run": {"out", "resume", "device", "compile", "max_steps", "log_every", "checkpoint_minutes", "knn_every", "knn_k"}
    | {"knn_temperature", "knn_bank", "recalibrate_bn"},
}


def default_folder(config: RunConfig) -> Path:
    """runs/NAME-DATA: NAME is the preset, or method and backbone."""
    name = config.preset or f"{config.model.method}-{config.model.backbone.replace('/', '-')}"
    data = Path(config.data.data.split(",")[0]).name.removesuffix(".beton")
    return Path("runs") / f"{name}-{re.sub('[^A-Za-z0-9._-]+', '-', data)}"


def parse(argv: list[str]) -> RunConfig:
    """The configuration that a command line describes: preset (the method's first one, the run to resume), then flags.

    Raises UserError for unknown names and for flags that the configuration does not read; tyro ends the program with
    status 2 for flags that do not exist.
    """
    preset = argv[0] if argv and not argv[0].startswith("-") else None
    flags = argv[1:] if preset else argv
    resuming, method = "--resume" in flags, _flag(flags, "--method")
    if preset:
        base = presets.load(preset)
    elif method is not None and not resuming:
        base = presets.first_of(method)
    else:
        base = configs.typed_config("fastsiam")()
    saved: RunConfig | None = None
    if resuming:
        folder = _flag(flags, "--out")
        if folder is None:
            if preset is None or _flag(flags, "--data") is None:
                raise UserError("--resume: say which run with --out DIR")
            folder = str(default_folder(configs.replace(base, data=_flag(flags, "--data"))))
        path = Path(folder) / "config.yaml"
        if not path.exists():
            raise UserError(f"--resume: {folder} holds no run (no config.yaml); leave --resume out to start one")
        saved = base = configs.load_yaml(path)
    if method is not None and method != base.model.method:
        base = configs.with_method(base, method)
    config = tyro.cli(
        configs.typed_config(base.model.method),
        prog="fastssl-train",
        description="Pre-train an image backbone without labels on one GPU (or a CPU): fastssl-train [PRESET] --data "
        "TRAIN.beton [--val VAL.beton] [OPTIONS]. PRESET is a named recipe (fastssl-train --list [WORD] shows them); "
        "options change single values of it. --method M without PRESET "
        "starts from M's first recipe in that list (optimiser, augmentation, heads, epochs) at 32 images per step, to "
        "which its rate is scaled; without either it is FastSiam. Options of the method itself are those of --method "
        f"(here: {base.model.method}).",
        default=base,
        args=flags,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    if saved is not None:
        _check_resumable(saved, config)
    configs.refuse_unread(config, base, _names(flags))
    return config


def _flag(flags: list[str], name: str) -> str | None:
    """The value of a flag before the command line is parsed: which options exist depends on it."""
    value = None
    for here, following in itertools.zip_longest(flags, flags[1:]):
        if here == name:
            value = following
        elif here.startswith(name + "="):
            value = here.removeprefix(name + "=")
    return value


def _names(flags: list[str]) -> set[str]:
    """Names of the options that a command line gives: --no-sync-bn and --sync-bn name sync_bn."""
    words = {flag.partition("=")[0].removeprefix("--").replace("-", "_") for flag in flags if flag.startswith("--")}
    return words | {word.removeprefix("no_") for word in words}


def _check_resumable(saved: RunConfig, config: RunConfig) -> None:
    before, after = configs.to_dict(saved), configs.to_dict(config)
    for group in ("data", "model", "method_options", "optim", "run"):
        for name, value in after[group].items():
            if name not in RESUMABLE.get(group, ()) and value != before[group].get(name):
                raise UserError(
                    f"--resume cannot change {name} from {before[group].get(name)} to {value}: leave the flag "
                    "out, or start a new run in another folder"
                )
