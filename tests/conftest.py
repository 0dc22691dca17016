"""What every test gets: one thread, fixed seeds, and the shared material by name."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_configure() -> None:
    """Small networks on shared cores are faster, and repeat exactly, on one thread."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """No test depends on those that ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the generator that timm draws from
    torch.manual_seed(0)


@pytest.fixture
def shared() -> Path:
    """The folder beside the repository with papers and data sets."""
    if not SHARED.is_dir():
        pytest.skip("the folder ../shared (papers and data sets) is not beside the repository")
    return SHARED
