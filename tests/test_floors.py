"""Import floors: what each folder of the tree may import, read from the source (imports inside functions included)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]

# Modules that every folder of fastssl may import. They import nothing of fastssl but each other.
SHARED = ("cli", "conditions", "device", "export", "files", "processes", "progress")
# Folders, lowest first: each imports only those before it. docs/architecture.md draws them.
FLOORS = ("networks", "losses", "methods", "config", "evaluate", "training", "planning")
# Entries and public names, which import any floor and which no floor imports.
FACES = ("train", "ops", "addons", "__init__")


class Import(NamedTuple):
    """A module that imports another, and where."""

    importer: str
    imported: str
    where: str


def module_name(path: Path) -> str:
    """The dotted name of a module, with `__init__` for a package's own file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {module_name(p): p for package in ("fastssl", "loaders") for p in sorted((ROOT / package).rglob("*.py"))}


def target(dotted: str) -> str | None:
    """The module of the tree that a dotted name means: `loaders.Batch` is `loaders.__init__`. None: not of the tree."""
    parts = dotted.split(".")
    while parts:
        for name in (".".join(parts), ".".join([*parts, "__init__"])):
            if name in MODULES:
                return name
        parts.pop()
    return None


def type_checking(node: ast.AST) -> bool:
    """True for `if TYPE_CHECKING:`, whose imports never run."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below `node` that run."""
    for child in ast.iter_child_nodes(node):
        if not type_checking(child):
            yield child
            yield from statements(child)


def imports_of(name: str, path: Path) -> Iterator[Import]:
    """Imports of modules of the tree in one of its modules."""
    for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import, write the whole name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for dotted in names:
            if (found := target(dotted)) and found != name:
                yield Import(name, found, f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)} imports {found}")


IMPORTS = [found for name, path in MODULES.items() for found in imports_of(name, path)]


def floor(name: str) -> int:
    """The floor of a module: 0 loaders, 1 shared modules, then the folders, then the faces."""
    package, part, *_ = name.split(".")
    if package == "loaders":
        return 0
    if part in SHARED:
        return 1
    return 2 + FLOORS.index(part) if part in FLOORS else 2 + len(FLOORS)


def test_every_module_has_a_floor() -> None:
    parts = {name.split(".")[1] for name in MODULES if name.startswith("fastssl.")}
    assert parts == {*SHARED, *FLOORS, *FACES}, "a new module or folder needs its place in tests/test_floors.py"
    assert len(FLOORS) <= 8


def test_a_folder_imports_only_those_above_it_in_the_list() -> None:
    up = [i.where for i in IMPORTS if floor(i.imported) > floor(i.importer) and i.imported != "fastssl.__init__"]
    assert not up, "\n".join(up)


def test_loaders_never_imports_fastssl() -> None:
    assert not [i.where for i in IMPORTS if i.importer.startswith("loaders.") and i.imported.startswith("fastssl.")]


def test_the_loader_does_not_import_the_converter() -> None:
    inside = "loaders.convert."
    assert not [i.where for i in IMPORTS if i.imported.startswith(inside) and not i.importer.startswith(inside)]


def test_no_floor_imports_a_face() -> None:
    faces = {f"fastssl.{face}" for face in FACES} - {"fastssl.__init__"}
    assert not [i.where for i in IMPORTS if i.imported in faces]


def circle(edges: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, the first again at the end; empty if there is none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for following in sorted(edges.get(name, ())):
            if found := walk(following, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(edges) if (found := walk(name, []))), [])


def test_no_circle() -> None:
    edges: dict[str, set[str]] = {name: set() for name in MODULES}
    for i in IMPORTS:
        edges[i.importer].add(i.imported)
    assert not (found := circle(edges)), " -> ".join(found)


@pytest.mark.parametrize(
    ("edges", "found"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, ["b", "c", "b"]),
        ({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}, []),
    ],
)
def test_circles_are_found(edges: dict[str, set[str]], found: list[str]) -> None:
    assert circle(edges) == found


def test_imports_inside_functions_and_of_names_are_seen() -> None:
    assert any(i.importer == "fastssl.train" and i.imported == "fastssl.training.trainer" for i in IMPORTS)
    assert any(i.importer == "fastssl.methods.base" and i.imported == "loaders.views" for i in IMPORTS)
