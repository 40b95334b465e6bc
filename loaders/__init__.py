"""Bytes to views: the .beton file, the converter and the loader. Never imports fastssl.

import loaders
with loaders.open("train.beton", loaders.views.simsiam(K=4, size=224), batch_size=32, device="cuda") as loader:
    for batch in loader.epoch(0):
        batch.views  # 4 tensors [32, 3, 224, 224], normalised, channels last
"""

from loaders import beton, views
from loaders.errors import UserError
from loaders.loader import Batch, Loader
from loaders.loader import open_loader as open
from loaders.views import ViewSpec

__version__ = "0.2.0"  # of the distribution; the only place that states it

__all__ = ["Batch", "Loader", "UserError", "ViewSpec", "__version__", "beton", "open", "views"]
