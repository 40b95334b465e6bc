"""Choice of the backend: measured here on this very file, explained in one line, remembered beside the data.

A data set that fits into memory decoded needs no decoder. Otherwise each backend that can run here cuts the views of
real batches for a second. Beside a GPU the one with the most images per second wins, but the CPU's by default, because
decoding on the GPU takes time from the network. On a CPU the one that spends the least CPU time per image wins: the
network needs the same cores. Batches of thousands are not decoded on a GPU: whole images take several times the
memory of their views, and in such batches the network is what limits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from loaders import backends
from loaders.augmenter import CropsOnly
from loaders.backends import resident
from loaders.beton import sidecar_path
from loaders.dataset import Dataset
from loaders.errors import UserError
from loaders.order import Order
from loaders.producer import Producer
from loaders.stats import Stats
from loaders.views import ViewSpec

# ffcv is not among them: its crops differ visibly from everybody else's, so that taking it is a decision.
MEASURED = ("cpu", "dali")
LARGE = 1024  # images per batch: above, the CPU decodes
SECONDS = 1.0  # of measuring per backend
MARGIN = 1.2  # so much faster must another backend be than the CPU's to be worth the GPU's time
FILL_SECONDS = 60.0  # decoding everything beforehand may take so long
SMALL = 64 << 20  # bytes: below, filling takes less time than measuring
_KEPT = 16  # machines remembered per file


@dataclass(frozen=True)
class Choice:
    """The backend to take and, in one line, why."""

    backend: str
    why: str


@dataclass(frozen=True)
class Rate:
    """Speed of a backend on real batches."""

    images_per_s: float
    cpu_ms: float  # CPU time per image, all threads


def choose(
    reader: Dataset,
    spec: ViewSpec,
    *,
    batch_size: int,
    device: torch.device,
    workers: int,
    order: str = "random",
    world: int = 1,
) -> Choice:
    """The backend for these views of this data on this machine. `world` processes share the host's memory."""
    if order == "sequential":
        return Choice("cpu", "one pass over the file")
    need, free = resident.bytes_needed(reader), resident.bytes_free(device) // (world if device.type == "cpu" else 1)
    fits = need <= resident.SHARE * free
    memory = f"{len(reader)} images decoded are {need / 1e9:.2g} GB of {free / 1e9:.3g} GB free on the {device.type}"
    if fits and need <= SMALL:
        return Choice("resident", memory)

    large = batch_size > LARGE
    path = sidecar_path(reader.paths[0], ".auto.json")
    key = _key(reader, spec, device, workers) + (" | large batches" if large else "")
    known = _load(path)
    if key in known and (fits or known[key]["backend"] != "resident"):
        return Choice(known[key]["backend"], f"{known[key]['why']} (measured before, see {path})")

    rates = {}
    for name in MEASURED[:1] if large else MEASURED:
        with contextlib.suppress(UserError):  # cannot run here, or not with this file
            num = min(batch_size, LARGE)
            rates[name] = measure(name, reader, spec, batch_size=num, device=device, workers=workers)
    choice = _decide(rates, device, memory, fits and len(reader) / rates["cpu"].images_per_s <= FILL_SECONDS)
    entry = dataclasses.asdict(choice) | {"rates": {n: dataclasses.asdict(r) for n, r in rates.items()}}
    _save(path, dict([*known.items(), (key, entry)][-_KEPT:]))
    return choice


def _decide(rates: dict[str, Rate], device: torch.device, memory: str, resident_fits: bool) -> Choice:
    """Choose by the rule in the module's docstring."""
    if resident_fits:
        return Choice("resident", memory)
    if device.type == "cpu":
        best = min(rates, key=lambda name: rates[name].cpu_ms)
        figures = [f"{name} {rate.cpu_ms:.2f} ms" for name, rate in rates.items()]
        return Choice(best, f"CPU time per image: {', '.join(figures)}")
    best = max(rates, key=lambda name: rates[name].images_per_s)
    if rates[best].images_per_s < MARGIN * rates["cpu"].images_per_s:
        best = "cpu"
    figures = [f"{name} {rate.images_per_s:.0f}" for name, rate in rates.items()]
    return Choice(best, f"images/s: {', '.join(figures)}")


def measure(
    name: str,
    reader: Dataset,
    spec: ViewSpec,
    *,
    batch_size: int,
    device: torch.device,
    workers: int,
    seconds: float | None = None,
) -> Rate:
    """Let a backend cut random batches of the file for a while; the first batch is not counted.

    Raises UserError if it cannot run here or with this file. Broken samples are passed over.
    """
    seconds, stats = SECONDS if seconds is None else seconds, Stats()
    backend = backends.load(name, device)(
        reader, spec, batch_size=batch_size, device=device, workers=workers, stats=stats
    )
    crops = CropsOnly(spec=spec, batch_size=batch_size, device=device, dtype=torch.uint8, stats=stats)
    order = Order(len(reader), batch_size=batch_size)
    with contextlib.closing(Producer(order, backend, crops, num_slots=4, on_bad_sample="skip")) as producer:
        batches, images = producer.endless(), 0
        next(batches)
        started, cpu = time.perf_counter(), time.process_time()
        while time.perf_counter() - started < seconds or not images:
            images += len(next(batches).index)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return Rate(images / (time.perf_counter() - started), 1000 * (time.process_time() - cpu) / images)


def _key(reader: Dataset, spec: ViewSpec, device: torch.device, workers: int) -> str:
    """Readable text of all that a measurement depends on."""
    files = ";".join(f"{p.name}:{p.stat().st_size}" for p in reader.paths)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    versions = []
    for package in ("torch", "torchvision", "nvidia-dali-cuda130", "nvidia-dali-cuda120"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{package} {metadata.version(package)}")
    sizes = ",".join(map(str, spec.sizes))
    host = f"{platform.node()} {os.cpu_count()} cores"
    return f"{files} | {sizes} px | {host} | {name} | {workers} threads | {', '.join(versions)}"


def _load(path: Path) -> dict:
    """Read the remembered choices; none where the file is absent or damaged."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return {k: v for k, v in known.items() if v["backend"] in backends.available() and isinstance(v["why"], str)}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _save(path: Path, known: dict) -> None:
    """Write the choices to remember, where the folder can be written."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with contextlib.suppress(OSError):
        partial.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
