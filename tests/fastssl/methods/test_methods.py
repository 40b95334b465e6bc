"""What every method must do, found by its file."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import random
import typing
from pathlib import Path

import pytest
import torch
import yaml
from small import OPTIONS, batch_of, config_of, has, losses, made, method_of

from fastssl import methods
from fastssl.config import schema as configs
from fastssl.networks.momentum import Momentum
from fastssl.networks.queue import Queue
from fastssl.progress import Progress
from fastssl.train import main
from fastssl.training import log as logs
from fastssl.training.build import make_method, make_views
from loaders import UserError
from loaders.views import RECIPES

every_method = pytest.mark.parametrize("name", methods.available())

FIRST, MIDDLE, LAST = (Progress(step, 12, 3) for step in (0, 5, 11))


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'simsiam'"):
        methods.load("simsam")


# ------------------------------------------------------------------ every method: views, options, help


@every_method
def test_views_follow_size_and_recipe(name: str) -> None:
    large = [view.size for view in make_views(config_of(name, size=64)).views]
    assert large[:2] == [64, 64]
    for recipe in RECIPES:
        config = config_of(name, size=64)
        config.data.recipe, config.data.blur = recipe, None
        spec = make_views(config)
        assert spec.views[:2] == RECIPES[recipe](2, 64).views
    config.data.crop_min, config.data.blur = 0.3, 0.25
    assert {(view.scale, view.blur_p) for view in make_views(config).views} == {((0.3, 1.0), 0.25)}


@every_method
def test_configuration_survives_yaml(name: str) -> None:
    config = config_of(name)
    assert configs.from_dict(yaml.safe_load(yaml.safe_dump(configs.to_dict(config))), "here") == config


# Values that no method can have.
WRONG = {
    "alpha": 2.0,
    "bn_splits": 0,
    "combine": 0,
    "combine_weight": 0.0,
    "dim": 0,
    "divide": 0,
    "ema": 1.5,
    "epsilon": 0.0,
    "extra_crops": -1,
    "num_local": -1,
    "num_views": 1,
    "predictor_hidden": 0,
    "projector_hidden": 0,
    "projector_layers": 0,
    "prototypes": 0,
    "queue_size": -1,
    "student_temperature": 0.0,
    "teacher_temperature": 0.0,
    "temperature": 0.0,
}


@pytest.mark.parametrize(
    ("name", "option"), [(n, o) for n in methods.available() for o in WRONG if has(config_of(n), o)]
)
def test_wrong_values_are_refused_by_name(name: str, option: str) -> None:
    with pytest.raises(UserError, match=f"^--{option.replace('_', '-')} {WRONG[option]}: "):
        config_of(name, **{option: WRONG[option]}).method_options.validate()


@every_method
def test_help_explains_every_option_of_the_method(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--method", name, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for option in configs.leaves(config_of(name)):
        assert "--" + option.replace("_", "-") in text


# ------------------------------------------------------------------ every method: loss, gradients, hooks


@every_method
def test_loss_falls_on_one_repeated_batch(name: str) -> None:
    """Less what the queues remember: this batch's keys among the negatives would raise the loss."""
    _, method, batch = made(name)
    queues = {m: copy.deepcopy(m.state_dict()) for m in method.modules() if isinstance(m, Queue)}
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    losses = []
    for _ in range(10):
        for queue, state in queues.items():
            queue.load_state_dict(state)
        loss, _ = method(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


@every_method
def test_half_precision_gives_the_loss_of_full_precision(name: str) -> None:
    """bf16 views under autocast, as on a GPU; the loss itself is computed in fp32."""
    _, method, batch = made(name)
    exact, _ = copy.deepcopy(method)(batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss, metrics = method(dataclasses.replace(batch, views=[v.bfloat16() for v in batch.views]))
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(m.dtype == torch.float32 for m in metrics.values())
    torch.testing.assert_close(loss, exact, rtol=0.03, atol=0.03)


VARIANTS = ({}, {"patches": "divide-encode-combine"}, {"guided": "guided"}, {"predictor": False}, {"num_local": 2})


@pytest.mark.parametrize(
    ("name", "options"), [(n, o) for n in methods.available() for o in VARIANTS if all(has(config_of(n), k) for k in o)]
)
def test_gradient_flows_only_through_the_last_layer_of_the_predicting_side(name: str, options: dict) -> None:
    """With its output cut off nothing is left: targets carry no gradient, not even where they share weights."""
    _, method, batch = made(name, **options)
    last = next(m for n in ("prototypes", "predictor", "projector") if (m := getattr(method, n, None)) is not None)
    last.register_forward_hook(lambda _module, _inputs, out: out.detach())
    assert not method(batch)[0].requires_grad


@every_method
def test_every_trainable_parameter_is_in_one_group_and_gets_a_gradient(name: str) -> None:
    """As the trainer builds it, on a ResNet-18 for small images."""
    config = config_of(name, backbone="resnet18-cifar")
    method, batch = make_method(config), batch_of(make_views(config))
    trainable = [p for p in method.parameters() if p.requires_grad]
    if hasattr(method, "param_groups"):
        ids = [id(p) for g in method.param_groups() for p in g["params"]]
        assert sorted(ids) == sorted(id(p) for p in trainable)
    loss, metrics = method(batch)
    loss.backward()
    assert loss.ndim == 0 and loss.dtype == torch.float32 and loss.isfinite()
    assert all(not m.requires_grad and m.ndim == 0 for m in metrics.values())
    assert 0 < metrics["feature_std"] <= 1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable)
    # What a method drops at the beginning it does not drop for ever.
    if hasattr(method, "after_backward"):
        method.after_backward(LAST)
    assert all(p.grad is not None for p in trainable)


@every_method
@pytest.mark.parametrize("progress", [FIRST, MIDDLE, LAST])
def test_hooks_bring_targets_halfway_to_the_network_and_nothing_else(name: str, progress: Progress) -> None:
    momentum = issubclass(methods.load(name).Config, Momentum)
    _, method, batch = made(name, **({"ema": 0.5, "ema_schedule": "constant"} if momentum else {}))
    with torch.no_grad():
        for n, p in method.named_parameters():
            p.add_(0 if n.startswith("target_") else torch.randn(p.shape))
    before = {n: t.clone() for n, t in method.state_dict().items()}
    for hook in ("before_step", "after_backward", "after_step"):
        if hasattr(method, hook):
            getattr(method, hook)(progress)
    parameters = {n for n, _ in method.named_parameters()}
    for n, t in method.state_dict().items():
        follows = n.startswith("target_") and n in parameters
        expected = (before[n] + before[n.removeprefix("target_")]) / 2 if follows else before[n]
        torch.testing.assert_close(t, expected, msg=lambda text, n=n: f"{n}: {text}")
    assert method(batch)[0].isfinite()


# ------------------------------------------------------------------ every method: all options together

# Options that are not a choice from a list, and the values to try. An option of an add-on must be here.
NUMBERS: dict[str, tuple] = {
    "divide": (2, 1),
    "combine": (2, 1, 4),
    "pairs": (None, 2),
    "combine_weight": (0.5, 0.3),
    "extra_crops": (0, 1),
    "extra_size": (None, 32),
    "num_local": (0, 2),
    "num_views": (4, 2),
    "local_size": (32, 64),
    "local_scale": ((0.05, 0.14), (0.1, 0.3)),
    "alpha": (None, 0.4, 1.0),
    "ema": (0.99, 0.0),
    "bn_splits": (1, 2),
    "projector_layers": (2, 1),
    "teacher_warmup_epochs": (0, 2),
    "queue_from_epoch": (15, 0),
}
Options = dict[str, object]
# Of the other options, how many differ from the default while a row is looked for: the fewer, the sooner it is taken.
SHARES = (1.0, 1.0, 0.8, 0.8, 0.6, 0.6, 0.5, 0.5, 0.4, 0.4, 0.3, 0.3, 0.2, 0.2, 0.1, 0.1, 0.05, 0.05, 0.0)


def choices(options_type: type) -> dict[str, tuple]:
    """The values to try of every option: of a Literal and of a bool all of them, of some numbers a few."""
    hints, found = typing.get_type_hints(options_type), {}
    addons = {
        name
        for base in options_type.__mro__
        if base.__module__ in ("fastssl.losses.guided", "fastssl.losses.multicrop", "fastssl.losses.patches")
        for name in base.__annotations__
    }
    for name, hint in hints.items():
        if typing.get_origin(hint) is typing.Literal:
            found[name] = typing.get_args(hint)
        elif hint is bool:
            found[name] = (False, True)
        elif name in NUMBERS:
            found[name] = NUMBERS[name]
        else:
            assert name not in addons, f"{name} is an option of an add-on: give NUMBERS some values to try"
    return found


def accepted(name: str, options: Options) -> bool:
    """Whether validate() takes these options."""
    try:
        config_of(name, **options).method_options.validate()
    except UserError:
        return False
    return True


def covering(name: str, values: dict[str, tuple], strength: int) -> list[Options]:
    """Options of the method in which every `strength` values occur together that validate() takes together."""
    default = {option: getattr(config_of(name).method_options, option) for option in values}
    drawn, strength = random.Random(0), min(strength, len(values))
    wanted = [
        tuple(zip(o, v, strict=True))
        for o in itertools.combinations(values, strength)
        for v in itertools.product(*(values[option] for option in o))
    ]
    drawn.shuffle(wanted)
    seen, rows = set(), []
    for some in wanted:
        for others in () if some in seen else SHARES:
            free = {o: drawn.choice(v) if drawn.random() < others else default[o] for o, v in values.items()}
            row = free | dict(some)
            if accepted(name, row):
                rows.append(row)
                seen.update(itertools.combinations(row.items(), strength))
                break
    return rows


def one_step(name: str, options: Options) -> None:
    """A step of the method with these options: loss and gradients have to be numbers, all parameters have to learn."""
    config = config_of(name, size=64, **options)
    spec = make_views(config)
    method, batch = method_of(config), batch_of(spec, 4)
    for hook in ("before_step", "after_backward", "after_step"):
        if hook == "after_backward":
            loss, _ = method(batch)
            loss.backward()
            assert loss.isfinite()
            assert all(p.grad.isfinite().all() for p in method.parameters() if p.requires_grad)
        if hasattr(method, hook):
            getattr(method, hook)(LAST)


@every_method
@pytest.mark.parametrize("strength", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_all_options_compose(name: str, strength: int) -> None:
    """Every two (three) values of options that validate() takes together make a step, whatever the others are.

    What it does not take must raise UserError there, and not when views, network or loss are made.
    """
    values = choices(methods.load(name).Config)
    chosen = covering(name, values, strength)
    for row in chosen:
        try:
            one_step(name, row)
        except Exception as error:
            raise AssertionError(f"{name} accepts {row}, then: {type(error).__name__}: {error}") from error
    # A value that no row has is refused by itself, and by its name.
    for option, value in ((o, v) for o, vs in values.items() for v in vs):
        if all(row[option] != value for row in chosen):
            with pytest.raises(UserError, match="--" + option.replace("_", "-")):
                config_of(name, **{option: value}).method_options.validate()


# ------------------------------------------------------------------ every method: exact resume

# Everything that a run carries from step to step is at work and changes before and after step 4 of 12, where it stops:
# 32 of 40 rows of a queue are filled, prototypes and the teacher's temperature change with the epoch, and numbers are
# drawn for combinations, partners and the order of shuffled keys.
ACTIVE = {
    "alpha": 0.4,
    "bn_splits": 2,
    "combine_by": "beta",
    "ema": 0.9,
    "ema_schedule": "cosine",
    "fixed_points": False,
    "guided": "random",
    "guided_views": 2,
    "num_local": 1,
    "patches": "divide-encode-combine",
    "queue_from_epoch": 0,
    "queue_size": 40,
    "symmetric": True,
    "teacher_warmup_epochs": 2,
    "teacher_warmup_temperature": 0.02,
}


@every_method
@pytest.mark.usefixtures("tiny")
def test_resume_gives_the_same_losses_to_the_last_bit(
    name: str, beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "save_curves", lambda *_: None)  # half of the time
    config = config_of(name, size=64)
    config = config_of(name, size=64, **{k: v for k, v in ACTIVE.items() if has(config, k)})
    words = ["--method", name, "--data", str(beton), "--size", "64", "--blur", "0", "--batch-size", "8"]
    words += ["--epochs", "2", "--warmup-epochs", "0", "--log-every", "1"]
    for option, value in (OPTIONS | ACTIVE).items():
        if has(config, option):
            flag = option.replace("_", "-")
            words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*words, "--out", str(whole)]) == 0
    assert main([*words, "--out", str(parts), "--max-steps", "4"]) == 0
    stopped = torch.load(parts / "checkpoint.pt", weights_only=True)["method"]
    assert main(["--out", str(parts), "--resume", "--max-steps", "12"]) == 0
    assert len(losses(whole)) == 12
    assert losses(parts) == losses(whole)
    ends = [torch.load(folder / "checkpoint.pt", weights_only=True)["method"] for folder in (parts, whole)]
    assert all(torch.equal(a, b) for a, b in zip(*(end.values() for end in ends), strict=True))
    # What the method remembers had changed when the run stopped, and went on changing.
    kept = {n: b for n, b in make_method(config).named_buffers() if n in stopped}  # the others follow from the step
    for buffer, start in kept.items():
        assert not torch.equal(stopped[buffer], start), buffer
        assert not torch.equal(stopped[buffer], ends[0][buffer]), buffer
