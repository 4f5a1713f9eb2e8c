"""What all tests share: the thread limits, the shared example data, and what needs a GPU."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of this checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of example session files beside the checkout; skips the test where it is absent."""
    return _existing(ROOT.parent / "shared" / "data")


@pytest.fixture(scope="session")
def shared_tokenizers() -> Path:
    """Folder of real tokenizers beside the checkout; skips the test where it is absent."""
    return _existing(ROOT.parent / "shared" / "tokenizers")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needing_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not needing_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needing_gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        pytest.skip(f"{folder.parent.name}/{folder.name} is not beside the checkout")
    return folder
