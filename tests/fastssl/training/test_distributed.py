"""Two processes compute what one does with the whole batch: losses, gradients, queues, centres."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small import cases, config_of, has, made
from torch import Tensor, distributed, nn

from fastssl import methods, processes
from fastssl.config.schema import RunConfig
from fastssl.device import pick_precision
from fastssl.losses import guided as addons
from fastssl.methods.base import Method
from fastssl.networks.batch_norm import group_batch_norm
from fastssl.networks.encode import encode_shuffled
from fastssl.progress import Progress
from fastssl.training.step import Step
from loaders import Batch

PROCESSES, IMAGES, STEPS = 2, 8, 3
CPU = torch.device("cpu")

# What has to work across processes is switched on: queues that are full after two steps, a schedule in every epoch.
ACTIVE = {
    "ema": 0.9,
    "freeze_epochs": 1,
    "queue_from_epoch": 0,
    "queue_size": 2 * IMAGES,
    "teacher_warmup_epochs": 3,
    "teacher_warmup_temperature": 0.02,
}
# Not montage: there an image's neighbours in the batch are in its receptive field.
ADDONS: list[dict[str, object]] = [
    {},
    {"guided": "guided", "guided_views": 2, "patches": "divide-encode-combine"},
    {"num_local": 2, "local_size": 16, "alpha": 0.4},
]
CASES = cases(ADDONS, ACTIVE)


class Company(nn.Module):
    """Every row becomes the sum of those that it came with."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(0).flatten().repeat(len(x))


def next_in_block(num: int, _fixed_points: bool, device: torch.device) -> Tensor:
    """Partners that are in the same process, however many there are: the next image of the same half of the batch."""
    image = torch.arange(num, device=device)
    block = IMAGES // PROCESSES
    return image // block * block + (image + 1) % block


def steps_of(config: RunConfig, method: Method, batch: Batch) -> list[dict]:
    """Loss, gradients and state after each of some `Step`s with this process's share of the images."""
    config.run.precision, config.run.compile, config.data.batch_size = "fp32", "off", IMAGES
    world = processes.World(processes.rank(), processes.size())
    step = Step(config, method, CPU, pick_precision("fp32", CPU), world)
    share = slice(world.rank * IMAGES // world.size, (world.rank + 1) * IMAGES // world.size)
    seen, hook, dtype = [], method.after_backward, next(method.parameters()).dtype

    def look(progress: Progress) -> None:
        seen.append({"grads": {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}})
        hook(progress)

    method.after_backward = look
    for i in range(STEPS):
        # Other images at every step.
        views = [(v.roll(i, 0) + i * v.roll(1, 3))[share].to(dtype) for v in batch.views]
        loss, _ = step(Batch(views, None, batch.index[share], batch.label[share]), Progress(i, STEPS, 1))
        seen[-1] |= {"loss": loss, "state": {n: t.clone() for n, t in method.state_dict().items()}}
    return seen


def some_steps(name: str, options: dict[str, object]) -> list[dict]:
    """Steps in eval mode: BatchNorm normalises with running statistics, so that no image depends on the others."""
    config, method, batch = made(name, B=IMAGES, **options)
    smooth(method.eval())
    return steps_of(config, method, batch)


# How BatchNorm in train mode sees two processes as one does; a method's queue of keys is computed without shuffling.
MODES = ("groups", "sync", "micro")
TRAINED = {
    n: {o: v for o, v in (ACTIVE | {"shuffle_bn": False}).items() if has(config_of(n), o)} for n in methods.available()
}


def trained_steps(name: str, mode: str) -> list[dict]:
    """Steps in train mode, float64. groups: every process has BatchNorm statistics of its own; sync: of all; micro: in
    micro-batches. One process does the same with BatchNorm groups as large, or with the whole batch."""
    config, method, batch = made(name, B=IMAGES, **TRAINED[name])
    torch.manual_seed(7)
    for p in method.parameters():
        if p.ndim == 1 and p.requires_grad:  # not SimSiam's zero at the end of every residual branch
            nn.init.uniform_(p, 0.5, 1)
    alone, own = processes.size() == 1, IMAGES // PROCESSES
    smooth(group_batch_norm(method.double(), sync=mode == "sync"))
    config.run.micro_batch = own // 2 if mode == "micro" and not alone else None
    if alone:
        group_batch_norm(method, images={"groups": own, "sync": None, "micro": own // 2}[mode])
    return steps_of(config, method, batch)


def smooth(module: nn.Module) -> None:
    """Without kinks: sums in another order would end on the other side of one at times, with another gradient."""
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU):
            setattr(module, name, nn.SiLU())
        elif isinstance(child, nn.MaxPool2d):
            setattr(module, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
        else:
            smooth(child)


def process(rank: int, folder: Path) -> None:
    """One of the processes: everything that the tests below look at, into a file."""
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=PROCESSES)
    addons.draw_partners = next_in_block
    results = {label: some_steps(*case) for label, case in CASES.items()}
    results |= {(name, mode): trained_steps(name, mode) for name in methods.available() for mode in MODES}
    results["gathered"] = gathered()
    torch.save(results, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each process saw."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(process, args=(folder,), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize("label", CASES)
def test_two_processes_take_the_steps_of_one(label: str, both: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addons, "draw_partners", next_in_block)
    for step, (one, *each) in enumerate(zip(some_steps(*CASES[label]), *(seen[label] for seen in both), strict=True)):

        def close(there: Tensor, here: Tensor, what: str, step: int = step) -> None:
            atol = 1e-5 * (1 + here.abs().max().item())
            torch.testing.assert_close(there, here, rtol=1e-4, atol=atol, msg=lambda t: f"step {step}, {what}: {t}")

        close(torch.stack([part["loss"] for part in each]).mean(), one["loss"], "loss")
        for part in each:
            assert part["grads"].keys() == one["grads"].keys()
            for name, grad in one["grads"].items():
                close(part["grads"][name], grad, f"gradient of {name}")
            assert part["state"].keys() == one["state"].keys()
        for name, here in one["state"].items():
            there = [part["state"][name] for part in each]
            for mine in there:
                close(mine, here, name)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", methods.available())
def test_two_processes_train_like_one(name: str, mode: str, both: list[dict]) -> None:
    """Loss, gradients and weights with BatchNorm in train mode, to rounding in float64."""
    one = trained_steps(name, mode)
    for step, here in enumerate(one):
        each = [seen[name, mode][step] for seen in both]
        loss = torch.stack([there["loss"] for there in each]).mean()
        torch.testing.assert_close(loss, here["loss"], rtol=1e-8, atol=1e-8)
        for there in each:
            torch.testing.assert_close(there["grads"], here["grads"], rtol=1e-4, atol=1e-6)
    for seen in both:
        for key, here in one[-1]["state"].items():
            if mode != "sync" and ("running" in key or "num_batches" in key):
                continue  # each process has its own
            there = seen[name, mode][-1]["state"][key]
            torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-7, msg=lambda m, k=key: f"{k}: {m}")


# ------------------------------------------------------------------ what methods are given to talk with


def own_x(rank: int) -> Tensor:
    return torch.arange(6.0, dtype=torch.float64).view(3, 2) + 10 * rank


def loss_of(rank: int, everything: Tensor) -> Tensor:
    """Another function of all rows in every process."""
    return (torch.arange(1.0, 13.0, dtype=torch.float64).view(6, 2) * (rank + 1) * everything**2).sum()


def gathered() -> dict[str, Tensor]:
    """What the functions of fastssl.processes give in this process."""
    rank = processes.rank()
    x = own_x(rank).requires_grad_()
    loss_of(rank, processes.gather_with_grad(x)).backward()
    torch.manual_seed(rank)
    images = 2.0 ** torch.arange(3.0).add(3 * rank).view(3, 1, 1, 1)  # a power of two each: sums name their terms
    return {
        "rows": processes.gather(x),
        "rows with grad": processes.gather_with_grad(x).detach(),
        "grad": x.grad,
        "own rows": processes.own_rows(3, x.device),
        "sum": processes.sum_over_processes(x),
        "mean": processes.mean_over_processes(x),
        "not changed": x.detach(),
        "permutation": processes.same_permutation(32, x.device),
        "images": images.flatten(),
        "back in place": encode_shuffled(nn.Flatten(), images).flatten(),
        "company": encode_shuffled(Company(), images),
    }


def test_gathered_rows_are_in_the_order_of_the_processes(both: list[dict]) -> None:
    every = torch.cat([own_x(rank) for rank in range(PROCESSES)])
    for rank, seen in enumerate(part["gathered"] for part in both):
        assert torch.equal(seen["rows"], every) and torch.equal(seen["rows with grad"], every)
        assert not seen["rows"].requires_grad
        assert torch.equal(every[seen["own rows"]], own_x(rank))


def test_gradients_of_every_process_flow_back_through_gathered_rows(both: list[dict]) -> None:
    """The derivative of the sum of all processes' losses, which averaging the processes' gradients makes the mean's."""
    every = torch.cat([own_x(rank) for rank in range(PROCESSES)]).requires_grad_()
    sum(loss_of(rank, every) for rank in range(PROCESSES)).backward()
    found = torch.cat([part["gathered"]["grad"] for part in both])
    torch.testing.assert_close(found, every.grad)


def test_sums_and_means_over_processes(both: list[dict]) -> None:
    for rank, seen in enumerate(part["gathered"] for part in both):
        total = sum(own_x(r) for r in range(PROCESSES))
        torch.testing.assert_close(seen["sum"].detach(), total)
        torch.testing.assert_close(seen["mean"].detach(), total / PROCESSES)
        assert not seen["sum"].requires_grad and not seen["mean"].requires_grad
        assert torch.equal(seen["not changed"], own_x(rank))


def test_processes_draw_one_permutation_from_generators_that_differ(both: list[dict]) -> None:
    first, second = (part["gathered"]["permutation"] for part in both)
    assert torch.equal(first, second)
    assert sorted(first.tolist()) == list(range(32))


def test_shuffled_images_are_encoded_among_those_of_other_processes_and_come_back(both: list[dict]) -> None:
    parts = [part["gathered"] for part in both]
    for seen in parts:
        assert torch.equal(seen["back in place"], seen["images"])
    images, company = (torch.cat([seen[key] for seen in parts]).int() for key in ("images", "company"))
    groups = set(company.tolist())
    assert len(groups) == PROCESSES and sum(groups) == images.sum() and all(g.bit_count() == 3 for g in groups)
    assert ((company & images) > 0).all()  # every image among its own company
    assert groups != {seen["images"].sum().int().item() for seen in parts}
