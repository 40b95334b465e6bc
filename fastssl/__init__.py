"""Views to weights: self-supervised pre-training of image backbones on one GPU."""

__version__ = "0.1.0"
