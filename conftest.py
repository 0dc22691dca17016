"""What tests and doctests get, also a single file of `src` or `research`: one thread."""

from __future__ import annotations

import gc

import torch


def pytest_configure() -> None:
    """Small networks on shared cores are faster, and repeat exactly, on one thread."""
    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Spare the garbage collector what was imported: it stays, and would be looked at again and again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Leave the process as it ends without tests: libraries report what was not collected."""
    gc.unfreeze()
