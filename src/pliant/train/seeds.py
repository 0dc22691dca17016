"""Random numbers that depend on their purpose, not on what was drawn before."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def mixed_seed(seed: int, *parts: int | str) -> int:
    """A seed in [0, 2**32) from a seed and its purpose.

    Example:
        >>> mixed_seed(0, 1, "order") == mixed_seed(0, 2, "order")
        False
    """
    # The bytes of strings, because their hashes differ between processes.
    words = [seed] + [p if isinstance(p, int) else int.from_bytes(p.encode(), "little") for p in parts]
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def seed_torch(value: int, device: torch.device) -> None:
    """Seed torch's generator of the CPU and, on a GPU, that of the current device.

    `torch.manual_seed` is slower: it looks for every kind of device, in each step.
    """
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.manual_seed(value)
    elif device.type != "cpu":
        torch.manual_seed(value)


@contextmanager
def seeded(seed: int, *parts: int | str) -> Iterator[None]:
    """Seed the generators of Python, numpy and torch's CPU within the block, and restore them after it.

    timm's mixup draws from numpy's, its auto-augment from Python's.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    torch_state = torch.random.get_rng_state()
    value = mixed_seed(seed, *parts)
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002
    torch.default_generator.manual_seed(value)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.random.set_rng_state(torch_state)
