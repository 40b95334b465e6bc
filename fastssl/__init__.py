"""Views to weights: self-supervised pre-training of image backbones on one GPU."""

import importlib.util
import sys
from pathlib import Path


def _check_loaders() -> None:
    """Stop if `import loaders` would find something else than the package beside this one, such as a folder of that
    name in the working directory: with one line and status 2 under `python -m fastssl...`, with ImportError in a
    program."""
    own, found = Path(__file__).resolve().parents[1] / "loaders" / "__init__.py", importlib.util.find_spec("loaders")
    origin = found.origin if found is not None else None
    if origin is not None and Path(origin).resolve() == own:
        return
    finds = f"{origin}: rename that, or start elsewhere" if origin else "none: install fastssl again"
    message = f"fastssl needs its package {own.parent}, but Python finds {finds}"
    if sys.argv[:1] == ["-m"]:  # the module to run is not known yet, and a traceback says less
        print(f"fastssl: error: {message}", file=sys.stderr)
        sys.exit(2)
    raise ImportError(message)


_check_loaders()

from loaders import __version__  # noqa: E402 (after the check)

__all__ = ["__version__"]
