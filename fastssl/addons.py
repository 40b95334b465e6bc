"""Public names of the weights that add-ons give pairs of views: guided stop-gradient, re-balanced multi-crop."""

from fastssl.losses.guided import guided_weights, guided_weights_4
from fastssl.losses.multicrop import rebalanced_weights

__all__ = ["guided_weights", "guided_weights_4", "rebalanced_weights"]
