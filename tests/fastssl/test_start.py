"""Starting up: what `fastssl-train --help` imports, a foreign package called loaders, public names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastssl
import loaders
from fastssl import addons, methods, ops

ROOT = Path(__file__).parents[2]


def python(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_help_imports_no_compiler_and_no_library_that_only_some_runs_need(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from fastssl.train import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as ended: assert ended.code == 0\n"
        "slow = ('torch._dynamo', 'torch._inductor', 'sympy', 'torchvision', 'timm', 'matplotlib', 'scipy')\n"
        "print('imported:', *(name for name in slow if name in sys.modules))\n"
    )
    done = python("-c", code, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "imported:"


@pytest.mark.parametrize("package", [True, False])
def test_a_foreign_loaders_in_the_working_directory_is_named_in_one_line(package: bool, tmp_path: Path) -> None:
    foreign = tmp_path / ("loaders/__init__.py" if package else "loaders.py")
    foreign.parent.mkdir(exist_ok=True)
    foreign.touch()
    done = python("-m", "fastssl.train", "--help", folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert str(foreign) in done.stderr and str(ROOT / "loaders") in done.stderr
    done = python("-c", "import fastssl", folder=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and f"ImportError: fastssl needs its package {ROOT / 'loaders'}" in done.stderr


def test_a_folder_called_loaders_without_python_files_does_not_disturb(tmp_path: Path) -> None:
    (tmp_path / "loaders").mkdir()
    assert python("-c", "import fastssl", folder=tmp_path).returncode == 0


def test_public_names() -> None:
    assert fastssl.__version__ == loaders.__version__
    assert callable(ops.divide) and callable(ops.sinkhorn) and callable(addons.guided_weights)
    assert methods.load("fastsiam").__name__ == "fastssl.methods.fastsiam"
