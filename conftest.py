"""What tests and doctests get, also a single file of `src` or `research`: one thread."""

from __future__ import annotations

import torch


def pytest_configure() -> None:
    """Small networks on shared cores are faster, and repeat exactly, on one thread."""
    torch.set_num_threads(1)
