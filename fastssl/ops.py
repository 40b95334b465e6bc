"""Public names of the functions that losses are written with: `fastssl.ops.combine` and the others."""

from fastssl.losses.ops import *  # noqa: F403
from fastssl.losses.ops import __all__ as __all__
