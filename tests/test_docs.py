"""Pages of the tree: links, files, commands, flags, recipes and examples that they name exist."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import io
import itertools
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from small import SMALL

import loaders
from fastssl import evaluate, methods
from fastssl.config import schema as configs
from fastssl.config.command_line import parse
from fastssl.config.presets import PRESETS
from fastssl.evaluate import command
from loaders import backends
from loaders.checks import flag
from loaders.convert.command import ConvertOptions

ROOT = Path(__file__).parents[1]
RECORDS = sorted((ROOT / "benchmarks" / "records").glob("*.md"))
CURRENT = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*CURRENT, ROOT / "CHANGELOG.md", *RECORDS]

# Files that a page tells the reader to write.
EXAMPLES = {"fastssl/methods/barlowtwins.py", "loaders/backends/black.py", "fastssl/evaluate/spread.py"}
# Flags of other programs.
FOREIGN = {"--check", "--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint", "--editable"}
# Benchmarks that take the options of fastssl-train beside their own.
WITH_TRAIN = ("benchmarks.budget", "benchmarks.e2e")
# fastssl-train and its like, or a module behind `-m`; then its words.
COMMAND = re.compile(r"\b(fastssl-(?:train|convert|eval)|(?<=-m )[a-z_][\w.]+)(?![\w.])(.*)")
# METHOD[-VARIANT]-DATASET-EPOCHSep
RECIPE = re.compile(r"(?<![\w-])[a-z][a-z0-9]*(?:-[a-z0-9]+)*-(?:imagenet|imagenette|cifar10)-\d+ep\b")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
current_page = pytest.mark.parametrize("page", CURRENT, ids=lambda p: p.name)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """What headings are called in links, as GitHub does it."""
    titles = re.findall(r"^#+ (.+)$", text_of(page), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if "://" not in target:
            name, _, anchor = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            assert file.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


@every_page
def test_files_exist(page: Path) -> None:
    folders = "|".join(p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith("."))
    for name in re.findall(rf"(?<![\w/])(?:{folders})/[\w./-]*\.(?:py|md|sh|json)\b", text_of(page)):
        assert "NAME" in name or name in EXAMPLES or (ROOT / name).is_file(), f"{page.name}: {name}"


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """(program or module, words) of every command in fenced blocks and in code spans."""
    text = text_of(page).replace(" \\\n", " ")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M)
    spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
    for line in [line for block in blocks for line in block.splitlines()] + spans:
        if found := COMMAND.search(" ".join(line.split())):
            yield found[1], shlex.split(re.sub(r"[\[\]]", " ", found[2].replace(" ...", "")), comments=True)


def train_flags(method: str | None = None) -> set[str]:
    """Flags of fastssl-train, with the options of one method or of all."""
    found = {"--list", "--help"}
    for name in [method] if method else methods.available():
        for option, value in configs.leaves(configs.typed_config(name)()).items():
            found |= {flag(option), flag(f"no_{option}")} if isinstance(value, bool) else {flag(option)}
    return found


def fields_flags(*options: type) -> set[str]:
    names = [f.name for kind in options for f in dataclasses.fields(kind)]
    return {flag(n) for n in names} | {flag(f"no_{n}") for n in names} | {"--help"}


@functools.cache
def module_flags(module: str) -> set[str]:
    """Flags that the help text of `python -m MODULE` names."""
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        patch.setattr("sys.argv", [module, "--help"])
        patch.delitem(sys.modules, module, raising=False)  # another test may have imported it
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    return set(re.findall(r"--[a-z][\w-]*", shown.getvalue())) | {"--help"}


def flags_of(program: str, words: list[str]) -> set[str]:
    """Flags that a command has; `words`: those that follow its name."""
    if program in ("fastssl-train", "fastssl.train"):
        preset = PRESETS.get(words[0]) if words else None
        given = dict(itertools.pairwise(words)).get("--method")
        method = given if given in methods.available() else preset.method if preset else None
        return train_flags(method)
    if program == "fastssl-convert":
        return fields_flags(ConvertOptions)
    if program == "fastssl-eval":
        kinds = [evaluate.load(name) for name in evaluate.available() if name in words] or [evaluate.Evaluation]
        return fields_flags(command.Common, *kinds)
    return module_flags(program) | (train_flags() if program in WITH_TRAIN else set())


@every_page
def test_commands_have_the_flags_that_they_are_given(page: Path) -> None:
    for program, words in commands(page):
        given = {w.partition("=")[0] for w in words if re.match(r"--[a-z]", w)}
        if given and program not in ("pytest", "pip"):
            assert not given - flags_of(program, words), f"{page.name}: {program}"
        if "." in program:
            assert importlib.util.find_spec(program), f"{page.name}: python -m {program}"


@current_page
def test_flags_exist(page: Path) -> None:
    known = train_flags() | fields_flags(ConvertOptions, command.Common) | FOREIGN
    known |= fields_flags(*(evaluate.load(name) for name in evaluate.available()))
    known |= {word for _, words in commands(page) for word in words}  # looked at above
    known |= {"--json"}
    assert not {*re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*(?![\w-])", text_of(page))} - known


@every_page
def test_recipes_exist(page: Path) -> None:
    assert not {*RECIPE.findall(text_of(page))} - PRESETS.keys()


@current_page
def test_commands_of_training_are_configurations(page: Path) -> None:
    for program, words in commands(page):
        placeholders = any(re.fullmatch(r"[A-Z]+|X|\.\.\.", w) for w in words)
        whole = "--data" in words and not placeholders and "--resume" not in words
        if program in ("fastssl-train", "fastssl.train") and whole:
            configs.validate(parse(words))


def test_the_picture_of_the_rooms_names_every_module() -> None:
    rooms = text_of(ROOT / "docs" / "architecture.md").split("## The way of a sample")[0]
    words = {*re.findall(r"\w+", re.search(r"^```\n(.*?)^```", rooms, re.S | re.M)[1])}
    found_by_name = {"methods", "presets", "evaluate"}  # the picture says "one file per ..."
    for module in (*ROOT.glob("fastssl/**/*.py"), *ROOT.glob("loaders/**/*.py")):
        if module.parent.name not in found_by_name and module.parent.name != "augment":
            assert {module.stem, module.parent.name} <= words, module


def test_the_readme_is_short() -> None:
    assert len(text_of(ROOT / "README.md").splitlines()) <= 150


def test_one_version() -> None:
    assert re.search(r"^## (\S+)", text_of(ROOT / "CHANGELOG.md"), re.M)[1] == loaders.__version__
    assert re.search(r"^version: (\S+)", text_of(ROOT / "CITATION.cff"), re.M)[1] == loaders.__version__


def example(name: str) -> str:
    """The Python of docs/architecture.md that belongs into file `name`."""
    text = text_of(ROOT / "docs" / "architecture.md")
    return re.search(rf"`{re.escape(name)}`.*?^```python\n(.*?)^```", text, re.S | re.M)[1]


def test_the_backend_of_the_page_works(beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "black.py").write_text(example("loaders/backends/black.py"), encoding="utf-8")
    monkeypatch.setattr(backends, "__path__", [*backends.__path__, str(tmp_path)])
    spec = loaders.ViewSpec((loaders.views.View(32),))
    with loaders.open(beton, spec, batch_size=8, backend="black") as loader:
        views = [batch.views[0].clone() for batch in loader.epoch()]
    assert len(views) == 6 and all(v.flatten(2).std(2).max() == 0 and (v < 0).all() for v in views)
    monkeypatch.delitem(sys.modules, "loaders.backends.black")


def test_the_evaluation_of_the_page_works(
    beton: Path, val_beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from fastssl.train import main as train

    (tmp_path / "spread.py").write_text(example("fastssl/evaluate/spread.py"), encoding="utf-8")
    monkeypatch.setattr(evaluate, "__path__", [*evaluate.__path__, str(tmp_path)])
    run = str(tmp_path / "run")
    assert train(["--data", str(beton), "--out", run, "--epochs", "1", "--max-steps", "1", *SMALL]) == 0
    assert command.main(["spread", run, "--data", str(beton), "--val", str(val_beton)]) == 0
    assert "all images" in capsys.readouterr().out
    monkeypatch.delitem(sys.modules, "fastssl.evaluate.spread")
