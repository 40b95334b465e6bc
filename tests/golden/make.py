"""Golden losses: the first steps of every method on record, to see that a change touched none that it should not.

    python -m tests.golden.make

rewrites tests/golden/losses.json. Use it after a new method or option was added, or when a change is meant to alter
losses; name in that change's record which entries moved, and why. It prints them; entries that did not move stay as
they are, to the last digit. If test_golden fails and you do not know why, do not run this: find out.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastssl import methods
from fastssl.config.schema import typed_config
from fastssl.progress import Progress
from fastssl.training.build import make_views
from loaders import Batch

FILE = Path(__file__).with_name("losses.json")
# Why not tighter: another CPU adds up in another order and draws normal numbers with another last bit, which five steps
# with BatchNorm over eight images multiply. With AVX-512, AVX2, SSE, with and without oneDNN, losses differ by up to
# 1.1e-5 (of 4); those near 0 are sums of cosines, for which the absolute share is.
RELATIVE, ABSOLUTE = 1e-4, 1e-5
STEPS, IMAGES = 5, 8

# Heads and queues of a size that trains in hundredths of a second, where a method has them.
SMALL = {"dim": 32, "projector_hidden": 32, "predictor_hidden": 16, "queue_size": 16, "prototypes": 32}
# Combinations of add-ons: method and options.
ADDONS: dict[str, tuple[str, dict[str, Any]]] = {
    "Fast-MoCo with 4 pairs, after the projector": ("fastmoco", {"pairs": 4, "combine_after": "projector"}),
    "guided SimSiam": ("simsiam", {"guided": "guided"}),
    "guided SimSiam of 2 views with patches": (
        "simsiam",
        {"guided": "guided", "guided_views": 2, "fixed_points": False, "patches": "divide-encode-combine"},
    ),
    "FastSiam with patches": ("fastsiam", {"patches": "divide-encode-combine"}),
    "symmetric MoCo v2 with split BatchNorm": ("mocov2", {"symmetric": True, "bn_splits": 2}),
    "SwAV with queues": ("swav", {"queue_from_epoch": 0, "num_local": 2, "local_size": 16}),
    "SSLight's DINO": (
        "dino",
        {"num_local": 2, "local_size": 16, "alpha": 0.4, "train_last_norm": True, "teacher_warmup_epochs": 3}
        | {"teacher_warmup_temperature": 0.02},
    ),
}


def entries() -> dict[str, tuple[str, dict[str, Any]]]:
    """Every method as it is, found by its file, and the combinations."""
    return {name: (name, {}) for name in methods.available()} | ADDONS


def backbone() -> tuple[nn.Module, int]:
    """A network that needs nothing but torch, and its features. Without kinks: there a last bit can be a step."""
    layers: list[nn.Module] = []
    for channels, narrower in ((3, 16), (16, 32)):
        layers += [nn.Conv2d(channels, narrower, 3, stride=2, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(narrower), nn.SiLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 32


def losses(method: str, options: dict[str, Any]) -> list[float]:
    """The losses of the first steps: fp32 on the CPU, SGD, normally distributed images, others at every step."""
    config = typed_config(method)()
    config.model.method, config.data.size, config.data.blur = method, 32, 0.0
    known = {f.name for f in dataclasses.fields(config.method_options)}
    for option, value in (SMALL | options).items():
        if option in known or option in options:
            setattr(config.method_options, option, value)
    config.method_options.validate()
    spec = make_views(config)
    torch.manual_seed(0)
    net = methods.load(method).Method(*backbone(), config.method_options)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    found = []
    for step in range(STEPS):
        progress = Progress(step, STEPS, 2)
        torch.manual_seed(1 + step)
        views = [torch.randn(IMAGES, 3, size, size) for size in spec.sizes]
        net.before_step(progress)
        loss, _ = net(Batch(views, None, torch.arange(IMAGES), torch.zeros(IMAGES, dtype=torch.int64)))
        optimizer.zero_grad()
        loss.backward()
        net.after_backward(progress)
        optimizer.step()
        net.after_step(progress)
        found.append(loss.item())
    return found


def recorded() -> dict[str, list[float]]:
    """What the file holds."""
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


def same(a: list[float], b: list[float]) -> bool:
    """Whether these are the losses of one program."""
    return torch.allclose(torch.tensor(a), torch.tensor(b), rtol=RELATIVE, atol=ABSOLUTE)


def main() -> None:
    """Compute all, keep what has not moved, write the file and say what is new in it."""
    before, after = recorded(), {}
    for name, (method, options) in entries().items():
        after[name] = losses(method, options)
        if name not in before:
            print(f"new:   {name}: {after[name]}")
        elif same(before[name], after[name]):
            after[name] = before[name]
        else:
            print(f"moved: {name}: {before[name]} -> {after[name]}")
    for name in before.keys() - after.keys():
        print(f"gone:  {name}")
    lines = (f"{json.dumps(name)}: {json.dumps(values)}" for name, values in after.items())
    FILE.write_text("{\n  " + ",\n  ".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
