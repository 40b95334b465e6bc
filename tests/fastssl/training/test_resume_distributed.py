"""Two processes stop after the same step and go on exactly where they were, with every method."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from small import OPTIONS, TinyResNet, config_of, has, losses

from fastssl import methods
from fastssl.config import schema as configs
from fastssl.config.schema import RunConfig
from fastssl.training import build as core
from fastssl.training.trainer import train

PROCESSES, EPOCHS, STOP = 2, 2, 5  # of 12 steps
# What a checkpoint could forget: a queue that serves, schedules, partners that are drawn.
ACTIVE = {"queue_size": 12, "queue_from_epoch": 0, "teacher_warmup_epochs": 2, "guided": "guided", "guided_views": 2}


def run_of(name: str, data: Path, out: Path, **more: object) -> RunConfig:
    config = config_of(name, size=64)  # that tiles have 32
    options = {k: v for k, v in (OPTIONS | ACTIVE).items() if has(config, k)}
    common = {"data": data, "out": out, "batch_size": 8, "epochs": EPOCHS, "log_every": 1, "workers": 1, "seed": 3}
    return configs.replace(config, **options, **common, backend="cpu", precision="fp32", **more)


def ports(num: int) -> list[int]:
    """Free ones."""
    sockets = [socket.socket() for _ in range(num)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    found = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return found


def process(rank: int, data: Path, folder: Path, free: list[int]) -> None:
    """One of the processes: for every method a run in one go, and one that is stopped and resumed."""
    torch.set_num_threads(1)
    core.backbone = lambda *_, **__: (TinyResNet(), TinyResNet.width)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES), "MASTER_ADDR": "127.0.0.1"}
    seen: list[float] = []
    results = {}
    for name in methods.available():
        for kind in ("whole", "stopped", "resumed"):
            os.environ["MASTER_PORT"] = str(free.pop())
            out = folder / name / ("whole" if kind == "whole" else "stopped")
            more = {"resume": True} if kind == "resumed" else {}

            def watch(step: int, loss: torch.Tensor, _metrics: object, stops: bool = kind == "stopped") -> None:
                seen.append(loss.item())
                if stops and step == STOP and rank == 1:
                    os.kill(os.getpid(), signal.SIGTERM)  # the first process hears of it from this one

            if kind == "resumed":  # what continues must come from the checkpoint, not from this process
                torch.manual_seed(1000 + rank)
            result = train(run_of(name, data, out, **more), Console(quiet=True), watch)
            results[name, kind] = {"losses": seen.copy(), "stopped": result["stopped"], "steps": result["steps"]}
            seen.clear()
    torch.save(results, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def both(beton: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], Path]:
    """What each process saw, and the folder of the runs."""
    folder = tmp_path_factory.mktemp("processes")
    free = ports(3 * len(methods.available()))
    torch.multiprocessing.spawn(process, args=(beton, folder, free), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)], folder


@pytest.mark.parametrize("name", methods.available())
def test_two_processes_stop_together(name: str, both: tuple[list[dict], Path]) -> None:
    first, second = (seen[name, "stopped"] for seen in both[0])
    assert (first["stopped"], second["stopped"]) == ("another process", "SIGTERM")
    assert first["steps"] == second["steps"] == len(first["losses"]) == len(second["losses"]) == STOP


@pytest.mark.parametrize("name", methods.available())
def test_two_processes_go_on_exactly(name: str, both: tuple[list[dict], Path]) -> None:
    """The same losses in both processes, and the same weights, to the last bit."""
    seen, folder = both
    for process in seen:
        whole = process[name, "whole"]["losses"]
        assert len(whole) == 12 and len(set(whole)) > 6
        assert process[name, "stopped"]["losses"] + process[name, "resumed"]["losses"] == whole
    weights = [load_file(folder / name / run / "weights.safetensors") for run in ("whole", "stopped")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert losses(folder / name / "whole") == losses(folder / name / "stopped")
