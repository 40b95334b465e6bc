"""Optimisers, parameter groups, schedules, and the order of what the trainer does in a step."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from small import config_of, forbid_waiting
from torch import Tensor, nn

from fastssl.config import presets
from fastssl.config import schema as configs
from fastssl.config.schema import Optim, RunConfig
from fastssl.methods import simsiam
from fastssl.methods.base import Method
from fastssl.progress import Progress
from fastssl.training.build import make_method
from fastssl.training.optimizers import lr_at, make_optimizer, scaled_lr, set_lr, set_weight_decay, weight_decay_at
from fastssl.training.trainer import Trainer
from loaders.errors import UserError


def published(preset: str) -> Optim:
    return presets.load(preset).optim


def small(beton: Path | str, folder: Path | str, **fields: object) -> RunConfig:
    """Two epochs of three steps of SimSiam."""
    common = {"batch_size": 16, "epochs": 2, "lr": 0.1, "lr_batch_size": 0, "device": "cpu", "precision": "fp32"}
    common |= {"data": str(beton), "out": folder, "workers": 1, "blur": None}
    return configs.replace(config_of("simsiam"), **common | fields)


def rates(optim: Optim, base_lr: float, steps_per_epoch: int) -> list[float]:
    return [lr_at(optim, base_lr, step, steps_per_epoch) for step in range(optim.epochs * steps_per_epoch)]


# ---------------------------------------------------------------------- learning rate


def test_a_rate_without_a_batch_size_is_not_scaled() -> None:
    assert scaled_lr(Optim(lr=0.125, lr_batch_size=32), 256) == 1.0  # 20 times SimSiam's
    assert scaled_lr(Optim(lr=0.06, lr_batch_size=0), 256) == 0.06


def test_cosine_per_epoch_is_simsiams() -> None:  # T11
    optim = Optim(epochs=100, schedule="epoch")
    for epoch in (0, 1, 50, 99):
        expected = 0.5 * 0.1 * (1 + math.cos(math.pi * epoch / 100))
        for step in (0, 6):
            assert lr_at(optim, 0.1, epoch * 7 + step, 7) == pytest.approx(expected)


def test_fast_mocos_rate() -> None:  # T11: LR(1) = .025, LR(W) = .1, counted from 1
    steps, optim = 11, published("fastmoco-imagenet-100ep")
    found = rates(optim, scaled_lr(optim, 512), steps)
    assert found[0] == pytest.approx(0.025)
    assert found[steps - 1] == pytest.approx(0.1)
    assert torch.tensor(found[:steps]).diff().tolist() == pytest.approx([0.0075] * (steps - 1), rel=1e-4)
    assert found[steps] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(found[steps:]))
    assert found[-1] == pytest.approx(0.05 * (1 + math.cos(math.pi * (1 - 1 / (99 * steps)))))


def test_swavs_rate() -> None:
    """Warm-up from .3 to 4.8 in ten epochs, both ends on the line, then a cosine to .0048 (SwAV's code)."""
    found = torch.tensor(rates(published("swav-imagenet-200ep"), 4.8, 6), dtype=torch.float64)
    torch.testing.assert_close(found[:60], torch.linspace(0.3, 4.8, 60, dtype=torch.float64))
    t = torch.arange(1140, dtype=torch.float64) / 1140
    torch.testing.assert_close(found[60:], 0.0048 + 0.5 * (4.8 - 0.0048) * (1 + (math.pi * t).cos()))


def test_warm_up_may_end_in_mid_epoch() -> None:
    found = rates(Optim(epochs=2, schedule="step", warmup_epochs=0.5), 1.0, 8)
    assert found[:5] == pytest.approx([0, 1 / 3, 2 / 3, 1, 1])
    assert found[10] == pytest.approx(0.5)  # six of the twelve steps after warm-up are done


def test_warm_up_of_one_step_and_before_a_cosine_per_epoch() -> None:
    assert rates(Optim(epochs=3, schedule="step", warmup_epochs=1), 1.0, 1) == pytest.approx([1.0, 1.0, 0.5])
    found = rates(Optim(epochs=4, schedule="epoch", warmup_epochs=2, min_lr=0.1), 0.5, 3)
    assert found == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5] + [0.5] * 3 + [0.3] * 3)


def test_a_constant_rate_is_constant() -> None:
    assert set(rates(Optim(epochs=2, schedule="constant"), 0.06, 3)) == {0.06}
    found = rates(Optim(epochs=3, schedule="constant", warmup_epochs=2), 1.0, 2)
    assert found == pytest.approx([0, 1 / 3, 2 / 3] + [1] * 3)


def test_a_lowest_rate_above_the_rate_is_refused() -> None:
    with pytest.raises(UserError, match=r"--min-lr 0\.0048 .* 0\.00375 at --batch-size 2"):
        scaled_lr(published("dino-sslight-r18-imagenet-200ep"), 2)


# ---------------------------------------------------------------------- weight decay


def test_weight_decay_rises_over_the_whole_run() -> None:
    """DINO with a ViT: .04 to .4 on a cosine, at every step, without the learning rate's warm-up."""
    optim = published("dino-sslight-vit-t16-imagenet-200ep")
    found = [weight_decay_at(optim, step, 10) for step in range(2000)]
    assert found[0] == pytest.approx(0.04)
    assert found[1000] == pytest.approx(0.22)
    assert weight_decay_at(optim, 2000, 10) == pytest.approx(0.4)
    assert all(a < b for a, b in itertools.pairwise(found))
    assert weight_decay_at(published("dino-sslight-r18-imagenet-200ep"), 1000, 10) == 1e-6  # without an end


# ---------------------------------------------------------------------- groups


class InvertedResidual(nn.Module):
    """MobileNetV2's block: 1x1 up, 3x3 depth-wise, 1x1 down, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Conv2d(4, 8, 1, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.frozen = nn.Linear(3, 3).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(self.norm(self.depthwise(self.up(x))).relu())
        return self.scale * self.head(x.mean((2, 3)))

    def param_groups(self) -> list[dict]:
        head = list(self.head.parameters())
        rest = [p for p in self.parameters() if all(p is not h for h in head)]
        return [{"params": rest, "fixed_lr": False}, {"params": head, "fixed_lr": True}]


ONE_D = {"norm.weight", "norm.bias", "down.bias", "head.bias", "scale"}
MATRICES = {"up.weight", "down.weight", "head.weight"}
DEPTHWISE = {"depthwise.weight"}


def group_of(optimizer: torch.optim.Optimizer, block: nn.Module) -> dict[str, dict]:
    """Parameter name -> its group, for every parameter that the optimiser has; each may be there once."""
    names = {id(p): name for name, p in block.named_parameters()}
    found = [(names[id(p)], group) for group in optimizer.param_groups for p in group["params"]]
    assert max(Counter(name for name, _ in found).values()) == 1
    assert all(group["params"] for group in optimizer.param_groups)
    return dict(found)


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw", "adam"])
@pytest.mark.parametrize(("no_decay", "free"), [("none", set()), ("1d", ONE_D), ("1d+depthwise", ONE_D | DEPTHWISE)])
def test_what_decays(optimizer: str, no_decay: str, free: set[str]) -> None:
    block = InvertedResidual()
    optim = Optim(optimizer=optimizer, no_decay=no_decay, weight_decay=0.3)
    made = make_optimizer(block, optim, 0.1)
    groups = group_of(made, block)
    assert groups.keys() == ONE_D | MATRICES | DEPTHWISE  # what is frozen is not in it
    assert {name for name, g in groups.items() if not g["decay"]} == free
    assert {name: g["weight_decay"] for name, g in groups.items()} == {n: 0.0 if n in free else 0.3 for n in groups}
    assert {name for name, g in groups.items() if g["fixed_lr"]} == {"head.weight", "head.bias"}
    set_weight_decay(made, 0.7)
    assert {name: g["weight_decay"] for name, g in groups.items()} == {n: 0.0 if n in free else 0.7 for n in groups}


@pytest.mark.parametrize(("no_decay", "plain"), [("none", set()), ("1d", ONE_D), ("1d+depthwise", ONE_D)])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-6])
def test_what_lars_adapts(no_decay: str, plain: set[str], weight_decay: float) -> None:
    """Everything (apex) or all but <= 1-D (MoCo v3); depth-wise weights even where they do not decay (SSLight)."""
    block = InvertedResidual()
    optim = Optim(optimizer="lars", no_decay=no_decay, weight_decay=weight_decay)
    groups = group_of(make_optimizer(block, optim, 0.1), block)
    # timm adapts a group that decays or says so.
    assert {n for n, g in groups.items() if not (g["always_adapt"] or g["weight_decay"])} == plain


def test_kernels_are_few() -> None:
    """One group for each kind that occurs: two rates, with and without decay."""
    block = InvertedResidual()
    for no_decay, num in (("none", 2), ("1d", 4), ("1d+depthwise", 4)):
        assert len(make_optimizer(block, Optim(no_decay=no_decay), 0.1).param_groups) == num
    assert len(make_optimizer(block, Optim(optimizer="lars", no_decay="1d+depthwise"), 0.1).param_groups) == 5


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("no_decay", ["none", "1d"])
def test_predictor_rate_is_fixed_on_request(fixed: bool, no_decay: str) -> None:  # T11
    config = small("", "", fix_pred_lr=fixed, no_decay=no_decay, weight_decay=5e-4)
    method = make_method(config)
    optimizer = make_optimizer(method, config.optim, 0.1)
    predictor = {id(p) for p in method.predictor.parameters()}
    for lr in (0.0, 0.03):  # warm-up and after
        set_lr(optimizer, lr)
        found = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
        assert {found[i] for i in predictor} == ({0.1} if fixed else {lr})
        assert {r for i, r in found.items() if i not in predictor} == {lr}
    assert {g["weight_decay"] for g in optimizer.param_groups} == ({5e-4} if no_decay == "none" else {5e-4, 0.0})


def test_groups_must_cover_every_parameter() -> None:
    block = InvertedResidual()
    whole = block.param_groups()
    for groups in (whole[:1], [*whole, whole[1]]):  # a parameter too few, one twice
        block.param_groups = lambda groups=groups: groups
        with pytest.raises(ValueError, match="exactly once"):
            make_optimizer(block, Optim(), 0.1)


# ---------------------------------------------------------------------- steps against formulas


def steps_of(
    optim: Optim, formula: Callable[[str, Tensor, Tensor, dict], Tensor], num: int = 3, shrink: float = 1.0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters after `num` steps of the optimiser, and as `formula(name, p, gradient, state)` gives them in float64.

    Both take the gradients at the optimiser's parameters. `shrink` scales all gradients.
    """
    torch.manual_seed(1)
    block = InvertedResidual()
    nn.init.normal_(block.norm.weight)
    nn.init.zeros_(block.down.bias)  # as the norm's is
    params = {name: p for name, p in block.named_parameters() if p.requires_grad}
    expected = {name: p.detach().double() for name, p in params.items()}
    state: dict[str, dict] = {name: {} for name in params}
    optimizer = make_optimizer(block, optim, 0.5)
    for _ in range(num):
        (shrink * block(torch.randn(5, 4, 6, 6)).square().sum()).backward()
        for name, p in params.items():
            expected[name] = formula(name, expected[name], p.grad.double(), state[name])
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().double() for name, p in params.items()}, expected


def same(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)


CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_sgd_is_its_formula(momentum: float) -> None:
    """v <- momentum v + g + decay w; w <- w - lr v. The first step starts from v = 0."""
    optim = Optim(momentum=momentum, weight_decay=0.1, no_decay="1d")

    def formula(name: str, w: Tensor, g: Tensor, state: dict) -> Tensor:
        state["v"] = momentum * state.get("v", 0) + g + (0.0 if name in ONE_D else 0.1) * w
        return w - 0.5 * state["v"]

    same(*steps_of(optim, formula, shrink=1e-2), **CLOSE)


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_adam_is_its_formula(kind: str) -> None:
    """Decay in the gradient (adam), or on the weights by lr decay w (adamw); betas .9 and .999, bias corrected."""
    optim = Optim(optimizer=kind, weight_decay=0.1, no_decay="1d")

    def formula(name: str, w: Tensor, g: Tensor, state: dict) -> Tensor:
        decay = 0.0 if name in ONE_D else 0.1
        g = g + decay * w if kind == "adam" else g
        t = state["t"] = state.get("t", 0) + 1
        m = state["m"] = 0.9 * state.get("m", 0) + 0.1 * g
        v = state["v"] = 0.999 * state.get("v", 0) + 0.001 * g**2
        kept = w * (1 - 0.5 * decay) if kind == "adamw" else w
        return kept - 0.5 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)

    same(*steps_of(optim, formula), rtol=1e-4, atol=1e-5)


def moco_v3(name: str, w: Tensor, g: Tensor, state: dict, *, decay: float, free: set[str]) -> Tensor:
    """One step of MoCo v3's LARS: the ratio eta ||w|| / ||g + decay w|| inside the buffer, eta = .001."""
    if name not in ONE_D:
        g = g + (0.0 if name in free else decay) * w
        ratio = 0.001 * w.norm() / g.norm() if w.norm() > 0 and g.norm() > 0 else 1.0
        g = ratio * g
    state["v"] = 0.9 * state.get("v", 0) + g
    return w - 0.5 * state["v"]


@pytest.mark.parametrize("no_decay", ["1d", "1d+depthwise"])
@pytest.mark.parametrize("decay", [0.0, 1e-6])
def test_lars_is_moco_v3s(no_decay: str, decay: float) -> None:
    """At the decay that it is used with; <= 1-D parameters are neither decayed nor adapted, depth-wise ones adapted."""
    optim = Optim(optimizer="lars", weight_decay=decay, no_decay=no_decay)
    free = DEPTHWISE if no_decay == "1d+depthwise" else set()
    found, expected = steps_of(optim, lambda *given: moco_v3(*given, decay=decay, free=free), shrink=1e-2)
    same(found, expected, **CLOSE)
    # Not so for a formula that adapts everything: the comparison sees the difference.
    _, other = steps_of(optim, lambda _, *given: moco_v3("w", *given, decay=decay, free=free), shrink=1e-2)
    assert all((other[name] - expected[name]).abs().max() > 1e-4 for name in ("norm.weight", "head.bias"))


@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_lars_of_everything_is_apexs(decay: float) -> None:
    """no_decay none: biases and norms too; eta ||w|| / (||g|| + decay ||w|| + 1e-8), and 1 for a norm of zero."""
    optim = Optim(optimizer="lars", weight_decay=decay, trust_coefficient=0.02)
    ratios = {}

    def formula(name: str, w: Tensor, g: Tensor, state: dict) -> Tensor:
        zero = w.norm() == 0 or g.norm() == 0
        ratio = 1.0 if zero else 0.02 * w.norm() / (g.norm() + decay * w.norm() + 1e-8)
        ratios.setdefault(name, ratio)
        state["v"] = 0.9 * state.get("v", 0) + ratio * (g + decay * w)
        return w - 0.5 * state["v"]

    same(*steps_of(optim, formula, shrink=1e-2), **CLOSE)
    assert {name for name, ratio in ratios.items() if ratio == 1.0} == {"down.bias", "norm.bias"}  # they start at zero


def test_lars_with_a_gradient_of_zero_only_decays() -> None:
    layer = nn.Linear(3, 2, bias=False)
    before = layer.weight.detach().clone()
    optimizer = make_optimizer(Method(layer, 1), Optim(optimizer="lars", weight_decay=0.1, no_decay="1d"), 0.5)
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), before * (1 - 0.5 * 0.1))


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw", "adam"])
def test_a_parameter_without_gradient_stays(optimizer: str) -> None:
    """As when its gradient is dropped for the first steps: no decay, no momentum; then it starts as if new."""
    a, b = (nn.Parameter(torch.full((2, 2), 3.0)) for _ in range(2))
    made = make_optimizer(Method(nn.ParameterList([a, b]), 1), Optim(optimizer=optimizer, weight_decay=0.1), 0.5)
    first = None
    for step in range(4):
        a.grad = torch.ones(2, 2)
        b.grad = torch.ones(2, 2) if step >= 2 else None
        made.step()
        if step == 0:
            first = a.detach().clone()
        if step < 2:
            assert torch.equal(b, torch.full((2, 2), 3.0))
        if step == 2:
            torch.testing.assert_close(b.detach(), first)


# ---------------------------------------------------------------------- bad values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": "lamb"}, "--optimizer lamb: one of sgd, lars, adamw, adam"),
        ({"no_decay": "bias"}, "--no-decay bias: one of"),
        ({"schedule": "linear"}, "--schedule linear: one of epoch, step, constant"),
        ({"lr": 0.0}, "--lr 0.0: must be above 0"),
        ({"lr_batch_size": -1}, "--lr-batch-size -1"),
        ({"momentum": 1.0}, "--momentum 1.0"),
        ({"weight_decay": -0.1}, "--weight-decay -0.1"),
        ({"weight_decay_end": -0.4}, "--weight-decay-end -0.4"),
        ({"trust_coefficient": 0.0}, "--trust-coefficient 0.0"),
        ({"warmup_epochs": 100.0}, "--warmup-epochs 100.0"),
        ({"warmup_start": 1.5}, "--warmup-start 1.5"),
        ({"min_lr": -1e-3}, "--min-lr -0.001"),
        ({"min_lr": 1e-3, "schedule": "constant"}, "--schedule constant"),
        ({"clip_norm": 0.0}, "--clip-norm 0.0"),
        ({"epochs": 0}, "--epochs 0"),
    ],
)
def test_bad_values_name_their_flag(values: dict, message: str) -> None:
    config = small("train.beton", "run", **{"epochs": 100} | values)
    with pytest.raises(UserError) as error:
        configs.validate(config)
    assert message in str(error.value)


# ---------------------------------------------------------------------- in the trainer


def run(config: RunConfig) -> Method:
    trainer = Trainer(config, Console(quiet=True))
    assert trainer.run()["steps"] == 6
    return trainer.setup.method


def test_hooks_come_in_order_and_with_one_progress(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, object]] = []
    weights: list[Tensor] = []
    gradients: list[bool] = []
    forward = simsiam.Method.forward

    def hook(name: str) -> Callable[[nn.Module, Progress], None]:
        def called(self: nn.Module, progress: Progress) -> None:
            seen.append((name, progress))
            weights.append(self.predictor[0].weight.detach().clone())
            gradients.append(self.predictor[0].weight.grad is not None)

        return called

    def recorded(self: nn.Module, batch: object) -> object:
        seen.append(("forward", None))
        return forward(self, batch)

    for name in ("before_step", "after_backward", "after_step"):
        monkeypatch.setattr(simsiam.Method, name, hook(name), raising=False)
    monkeypatch.setattr(simsiam.Method, "forward", recorded)
    run(small(beton, tmp_path / "run"))

    order = ["before_step", "forward", "after_backward", "after_step"]
    assert [name for name, _ in seen] == order * 6
    for step in range(6):
        before, _, backward, after = (progress for _, progress in seen[4 * step : 4 * step + 4])
        assert before is backward is after
        assert before == Progress(step=step, steps=6, steps_per_epoch=3)
        assert (before.epoch, before.share) == (step // 3, step / 6)
        assert gradients[3 * step : 3 * step + 3] == [False, True, False]
        at = weights[3 * step : 3 * step + 3]
        assert torch.equal(at[0], at[1])  # the step comes after after_backward
        assert not torch.equal(at[1], at[2])


def test_the_gradient_is_clipped_to_its_norm(beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All parameters together, before the hook; what is small enough stays as it is."""

    def norms(clip_norm: float | None, folder: str) -> list[float]:
        found: list[float] = []

        def after_backward(self: nn.Module, progress: Progress) -> None:
            del progress
            found.append(torch.cat([p.grad.flatten() for p in self.parameters()]).norm().item())

        monkeypatch.setattr(simsiam.Method, "after_backward", after_backward, raising=False)
        run(small(beton, tmp_path / folder, clip_norm=clip_norm, lr=1e-6))
        return found

    free = norms(None, "free")
    limit = sorted(free)[3]  # half of the steps are above it
    clipped = norms(limit, "clipped")
    assert clipped == pytest.approx([min(norm, limit) for norm in free], rel=1e-3)
    assert sum(norm > 1.01 * limit for norm in free) >= 1


def test_the_trainer_follows_both_schedules(beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[float, set[float], float]] = []
    config = small(
        beton, tmp_path / "run", optimizer="adamw", lr=1e-3, schedule="step", warmup_epochs=1, warmup_start=0.25,
        min_lr=1e-5, weight_decay=0.04, weight_decay_end=0.4, no_decay="1d", fix_pred_lr=True,
    )  # fmt: skip
    trainer = Trainer(config, Console(quiet=True))

    def after_step(self: nn.Module, progress: Progress) -> None:
        del self, progress
        groups = trainer.setup.step.optimizer.param_groups
        (lr,) = {g["lr"] for g in groups if not g["fixed_lr"]}
        (decay,) = {g["weight_decay"] for g in groups if g["decay"]}
        found.append((lr, {g["lr"] for g in groups if g["fixed_lr"]}, decay))
        assert {g["weight_decay"] for g in groups if not g["decay"]} == {0.0}

    monkeypatch.setattr(simsiam.Method, "after_step", after_step, raising=False)
    trainer.run()
    lrs, fixed, decays = zip(*found, strict=True)
    assert lrs == pytest.approx([lr_at(config.optim, 1e-3, step, 3) for step in range(6)])
    assert lrs[:3] == pytest.approx([0.25e-3, 0.625e-3, 1e-3])
    assert set().union(*fixed) == {1e-3}
    assert decays == pytest.approx([0.22 - 0.18 * math.cos(math.pi * step / 6) for step in range(6)])


@pytest.mark.parametrize("optimizer", ["lars", "adamw"])
def test_every_optimizer_resumes_exactly(optimizer: str, beton: Path, tmp_path: Path) -> None:
    fields = {"optimizer": optimizer, "lr": 1e-3, "weight_decay_end": 0.4, "no_decay": "1d", "schedule": "step"}
    whole = run(small(beton, tmp_path / "whole", **fields))
    Trainer(small(beton, tmp_path / "parts", **fields, max_steps=2), Console(quiet=True)).run()
    parts = run(small(beton, tmp_path / "parts", **fields, resume=True))
    for (name, a), (_, b) in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_loss_scaling_does_not_change_the_step(clip_norm: float | None, beton: Path, tmp_path: Path) -> None:
    """Scaled gradients are unscaled before they are measured, once; a scale of 2^k changes no bit of them."""
    methods = []
    for scale in (None, 1024.0):
        config = small(beton, tmp_path / str(scale), clip_norm=clip_norm)
        trainer = Trainer(config, Console(quiet=True))
        if scale:
            trainer.setup.step.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer.run()
        methods.append(trainer.setup.method)
    for (name, a), (_, b) in zip(methods[0].named_parameters(), methods[1].named_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.gpu
@pytest.mark.parametrize(("optimizer", "precision"), [("sgd", "fp16"), ("adamw", "fp16"), ("lars", "bf16")])
def test_no_optimizer_waits_for_the_gpu(
    optimizer: str, precision: str, beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clipping, both schedules and every kind of group, without a synchronisation."""
    forbid_waiting(monkeypatch)
    fields = {"device": "cuda", "precision": precision, "compile": "off", "log_every": 6, "no_decay": "1d"}
    run(small(beton, tmp_path / "run", optimizer=optimizer, lr=1e-3, weight_decay_end=0.4, clip_norm=1.0, **fields))
