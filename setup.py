"""Packaging; the tools' settings (ruff, mypy, pytest) are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    text = (ROOT / "megatron_multiturn" / "_version.py").read_text(encoding="utf-8")
    found = re.search(r'__version__ = "([^"]+)"', text)
    if found is None:
        raise RuntimeError("megatron_multiturn/_version.py holds no __version__")
    return found[1]


setup(
    name="megatron-multiturn",
    version=read_version(),
    description="Packed multi-turn sessions in Megatron-LM, the loss an exact mean over turns",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.12",
    packages=find_packages(include=["megatron_multiturn", "megatron_multiturn.*"]),
    install_requires=[
        "torch>=2.11",
        "megatron-core>=0.17",
        "numpy>=1.26",
        "sentencepiece>=0.2",
        "transformers>=4.51",
        "tqdm>=4.66",
        "jinja2>=3.1",  # chat templates
        # Preprocessing does without these two, but takes many times as long.
        "gigatoken>=0.10",
        "orjson>=3.10",
        # Imported by Megatron on the way of a training run, but not required by its package.
        "einops>=0.8",  # parallel_state lays out the ranks of hierarchical context parallelism
        "packaging>=24.2",
        "psutil>=6",  # torch_dist checkpoints
        "pyyaml>=6",  # the configuration container
        "tensorboard>=2.16",  # --tensorboard-dir
    ],
    extras_require={
        "corpora": ["pyarrow>=15", "zstandard>=0.22"],  # Parquet and zstd files
        "te": ["transformer-engine[pytorch]>=2.9"],
        "dev": [
            "hypothesis>=6.100",
            "mypy>=1.15",
            "pyarrow>=15",
            "pytest>=8.2",
            "ruff>=0.12",
            "zstandard>=0.22",
        ],
    },
    entry_points={
        "console_scripts": [
            "megatron-multiturn-preprocess = megatron_multiturn.preprocess:run_command",
            "megatron-multiturn-merge = megatron_multiturn.merge:main",
            "megatron-multiturn-inspect = megatron_multiturn.inspection:main",
            "megatron-multiturn-selfcheck = megatron_multiturn.selfcheck:main",
        ]
    },
)
