"""The folder of a run: what lies in it, and that nothing in it is lost by mistake."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fastssl import export
from fastssl.config import schema as configs
from fastssl.config.schema import RunConfig
from fastssl.evaluate.recalibrate import NAME as RECALIBRATED
from fastssl.training import checkpoint
from fastssl.training import log as logs
from loaders import Loader, ViewSpec
from loaders.beton import Reader
from loaders.dataset import Readers
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


def begin(folder: Path, config: RunConfig, reader: Reader | Readers, spec: ViewSpec) -> None:
    """Make the folder of a new run, with its configuration and a picture of its views; a resumed one is left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    if config.run.resume:
        return
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)
    # In the folder's own record of itself the run is neither being resumed nor overwriting.
    own = dataclasses.replace(config.run, out=folder, overwrite=False)
    configs.save_yaml(dataclasses.replace(config, run=own), folder / CONFIG)
    seed, num = config.run.seed, min(8, len(reader))
    with Loader(reader, spec, batch_size=num, backend="cpu", seed=seed, workers=1) as loader:
        views = next(iter(loader.epoch(0))).views
        logs.save_views(folder / VIEWS, views, spec.mean, spec.std)
