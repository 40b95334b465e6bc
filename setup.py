"""Packaging of fastssl. The distribution is called `fastssl-pretrain` because `fastssl` on PyPI is something else."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
# Read as text: importing the package needs what it depends on.
VERSION = re.search(r'^__version__ = "(.+?)"', (HERE / "loaders/__init__.py").read_text(encoding="utf-8"), re.MULTILINE)

setup(
    name="fastssl-pretrain",
    version=VERSION[1],
    description="Self-supervised pre-training of image backbones on one consumer GPU",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["fastssl", "fastssl.*", "loaders", "loaders.*"]),
    package_data={"fastssl": ["py.typed"], "loaders": ["py.typed"]},
    install_requires=[
        "torch>=2.8",
        "torchvision>=0.23",
        "simplejpeg>=1.8",  # libjpeg-turbo without copies; torchvision's decoder is deprecated
        "timm>=1.0",  # every backbone that torchvision lacks
        "numpy>=1.26",
        "pillow>=10",  # image formats other than JPEG, when converting
        "bracex>=2.4",  # names of shards: part-{00..15}.beton
        "tyro>=0.9.28",  # command lines from typed dataclasses
        "docstring-parser>=0.15",  # the help texts that tyro shows
        "rich>=13",
        "pyyaml>=6",
        "safetensors>=0.4",
        "scikit-learn>=1.3",
        "matplotlib>=3.8",
    ],
    extras_require={
        "dali": ["nvidia-dali-cuda130"],
        # ffcv itself needs system libraries first: see tools/install_ffcv.sh.
        "ffcv": ["ffcv==1.0.2", "numba", "opencv-python-headless", "tqdm"],
        "test": ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6", "ruff>=0.15", "mypy>=1.16", "types-PyYAML"],
    },
    entry_points={
        "console_scripts": [
            "fastssl-convert=loaders.convert.command:main",
            "fastssl-train=fastssl.train:main",
            "fastssl-eval=fastssl.evaluate.command:main",
        ]
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Processing",
        "Typing :: Typed",
    ],
)
