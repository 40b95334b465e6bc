"""The folder of a run: its files, and the rules by which nothing in it is lost by mistake."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fastssl import export
from fastssl.config import schema as configs
from fastssl.config.schema import RunConfig
from fastssl.evaluate.recalibrate import NAME as RECALIBRATED
from fastssl.training import checkpoint
from fastssl.training import log as logs
from fastssl.training.build import Setup
from fastssl.training.monitor import Monitor
from loaders import Loader, ViewSpec, __version__
from loaders.dataset import Dataset
from loaders.errors import UserError

CONFIG, VIEWS, CURVES = "config.yaml", "views.png", "curves.png"
RUN_FILES = (CONFIG, logs.METRICS, checkpoint.NAME, export.NAME, RECALIBRATED, VIEWS, CURVES)


def check_folder(folder: Path, overwrite: bool) -> None:
    """Raise UserError if a new run in `folder` would destroy something."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file: give a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / CONFIG).exists():
        raise UserError(f"--out {folder} is not empty and holds no run of this program: give another folder")
    if not overwrite:
        raise UserError(f"--out {folder} holds a run: continue it with --resume, replace it with --overwrite")


def begin(folder: Path, config: RunConfig, reader: Dataset, spec: ViewSpec) -> None:
    """Make the folder of a new run, with its configuration and a picture of its views. A resumed run has one."""
    folder.mkdir(parents=True, exist_ok=True)
    if config.run.resume:
        return
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)
    # The kept configuration is that of a run which neither resumes nor overwrites.
    own = dataclasses.replace(config.run, out=folder, overwrite=False)
    configs.save_yaml(dataclasses.replace(config, run=own), folder / CONFIG)
    seed, num = config.run.seed, min(8, len(reader))
    with Loader(reader, spec, batch_size=num, backend="cpu", seed=seed, workers=1) as loader:
        views = next(iter(loader.epoch(0))).views
        logs.save_views(folder / VIEWS, views, spec.mean, spec.std)


def save_weights(folder: Path, setup: Setup, monitor: Monitor) -> None:
    """Write the backbone's weights and, with --recalibrate-bn, a second file with recalibrated BatchNorm statistics."""
    config = setup.config
    about: dict[str, object] = {
        "program": f"fastssl {__version__}",
        "backbone": config.model.backbone,
        "size": config.data.size,
        "config": configs.to_dict(config),
    }
    export.save_weights(folder / export.NAME, setup.method.backbone, about)
    if config.run.recalibrate_bn:
        about |= {"recalibrate_bn": config.run.recalibrate_bn}
        export.save_weights(folder / RECALIBRATED, monitor.recalibrated(), about)
