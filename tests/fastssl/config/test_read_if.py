"""Flags that the configuration does not read are refused. Every condition that a class of options declares is tried."""

from __future__ import annotations

import itertools
import re
import typing
from pathlib import Path

import pytest

from fastssl import methods
from fastssl.conditions import Condition
from fastssl.config import schema as configs
from fastssl.config.command_line import parse
from fastssl.config.schema import RunConfig
from fastssl.networks.backbones import NAMES
from fastssl.train import main
from loaders import UserError

NAMED = {"backbone": (*NAMES, "timm/resnet10t"), "val": (None, "val.beton")}


def config_of(method: str) -> RunConfig:
    return configs.typed_config(method)(model=configs.Model(method=method))


def declared() -> list[tuple[str, str, Condition]]:
    """(method, option, condition), each condition once."""
    found = {
        (option, condition): method
        for method in methods.available()
        for option, condition in configs.read_if(config_of(method)).items()
    }
    return [(method, option, condition) for (option, condition), method in found.items()]


def values(config: RunConfig, option: str) -> tuple:
    """Some that the option can have."""
    group = next(group for group in config.groups.values() if option in vars(group))
    hint, now = typing.get_type_hints(type(group))[option], configs.leaves(config)[option]
    if option in NAMED:
        return NAMED[option]
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    if isinstance(now, bool):
        return (False, True)
    return tuple(v / 2 for v in now) if isinstance(now, tuple) else (0, 1, 0.25, 32)


def changed(config: RunConfig, option: str) -> RunConfig:
    """The configuration with another value of the option."""
    now = configs.leaves(config)[option]
    other = tuple(v / 2 for v in now) if isinstance(now, tuple) else next(v for v in values(config, option) if v != now)
    return configs.replace(config, **{option: other})


@pytest.mark.parametrize(("method", "option", "condition"), declared(), ids=lambda x: x if isinstance(x, str) else "")
def test_an_option_is_refused_unless_its_condition_holds(method: str, option: str, condition: Condition) -> None:
    config, flag = config_of(method), "--(no-)?" + option.replace("_", "-")
    assert option in configs.leaves(config), "a condition of an option that does not exist"
    choices = [values(config, decider) for decider in condition.options]
    outcomes = set()
    for chosen in itertools.product(*choices):
        base = configs.replace(config, **dict(zip(condition.options, chosen, strict=True)))
        given = changed(base, option)
        # A preset may hold what is not read: only what the user changes is refused.
        configs.refuse_unread(given, given)
        holds = condition.holds(configs.leaves(given))
        outcomes.add(holds)
        if holds:
            configs.refuse_unread(given, base)
        else:
            with pytest.raises(UserError, match=f"^{flag} .*it needs {re.escape(condition.words)}"):
                configs.refuse_unread(given, base)
    assert outcomes == ({True, False} if condition.options else {False})


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--momentum 0.5 --optimizer adamw", "--momentum 0.5 is not read here: it needs --optimizer sgd or lars"),
        ("--optimizer adamw --momentum 0.9", "--momentum 0.9 is not read here"),  # though it is the default
        ("--fixed_points", "--fixed-points is not read here"),
        ("fastmoco-imagenet-100ep --patches off --pairs 4", "--pairs 4: --patches off combines no features"),
        ("swav-imagenet-100ep --schedule constant", "--schedule constant has none"),
        ("--no-fixed-points", "--no-fixed-points is not read here: it needs --guided other than off"),
        ("--guided guided --guided-views 4", "fastsiam's views serve in both roles"),
        ("--method mocov2 --local-scale 0.1 0.2", "--local-scale 0.1 0.2 is not read here: it needs --num-local"),
    ],
)
def test_the_command_line_refuses_in_one_line(command: str, message: str, capsys: pytest.CaptureFixture) -> None:
    assert main([*command.split(), "--data", "x.beton"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_values_of_a_preset_and_of_a_saved_run_are_not_refused(tmp_path: Path) -> None:
    """LARS under --optimizer adamw has a momentum, and an old run may hold a value that nothing reads."""
    parse(["swav-imagenet-100ep", "--data", "x.beton", "--optimizer", "adamw", "--num-local", "0"])
    saved = configs.replace(config_of("simsiam"), data="x.beton", momentum=0.5, optimizer="adam", guided_views=2)
    configs.save_yaml(saved, tmp_path / "config.yaml")
    resumed = parse(["--out", str(tmp_path), "--resume", "--max-steps", "7"])
    assert resumed == configs.replace(saved, out=tmp_path, resume=True, max_steps=7)
