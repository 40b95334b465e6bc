"""Packaging of fastssl. The distribution is called `fastssl-pretrain` because `fastssl` on PyPI is something else."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="fastssl-pretrain",
    version="0.1.0",
    description="Self-supervised pre-training of image backbones on one consumer GPU",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["fastssl", "fastssl.*", "loaders", "loaders.*"]),
    install_requires=[
        "torch>=2.8",
        "torchvision>=0.23",
        "simplejpeg>=1.8",  # libjpeg-turbo without copies; torchvision's decoder is deprecated
        "timm>=1.0",  # every backbone that torchvision lacks
        "numpy>=1.26",
        "pillow>=10",  # image formats other than JPEG, when converting
        "tyro>=0.9.28",  # command lines from typed dataclasses
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
        "test": ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6", "ruff>=0.6"],
    },
    entry_points={
        "console_scripts": [
            "fastssl-convert=loaders.convert.command:main",
            "fastssl-train=fastssl.train:main",
            "fastssl-eval=fastssl.evaluate.command:main",
        ]
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
