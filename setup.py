"""Packaging of maha-megatron. Tool settings live in pyproject.toml; the tested pins in launch/constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "maha_megatron" / "__init__.py").read_text()).group(1)

setup(
    name="maha-megatron",
    version=VERSION,
    description="Distributed pretraining of language models with multiscale hierarchical attention (MAHA)",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["maha_megatron", "maha_megatron.*"]),
    python_requires=">=3.11,<3.14",
    install_requires=[
        "torch>=2.10,<2.14",
        "deepspeed==0.19.8",
        "megatron-core>=0.16.1,<0.20",
        "numpy>=2.0,<3",
        "sentencepiece>=0.2.1,<0.3",
        "datasets>=4.0,<6",
        "tensorboard>=2.20,<3",
        "cvxpylayers>=1.2,<2",
        "diffcp>=1.1.9,<1.2",  # stated programs call its cone projections, which it does not promise to keep
        "safetensors>=0.5,<1",
        "pyyaml>=6.0,<7",
        "matplotlib>=3.9,<4",
        "tqdm>=4.66,<5",
        "zstandard>=0.23,<1",
        "psutil>=6,<8",
    ],
    extras_require={
        "dev": [
            "entmax>=1.3,<2",
            "pytest>=8,<10",
            "pytest-timeout>=2.3,<3",
            "ruff>=0.14,<0.18",
            "triton>=3.6,<3.8",  # runs kernels on a CPU too, step by step
        ],
        "hf": ["transformers>=5.0,<6"],
        "gpu": ["triton>=3.6,<3.8"],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
