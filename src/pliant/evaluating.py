"""Evaluation mode for a while: `evaluating`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Put networks into evaluation mode for a block; each module's own mode comes back.

    A network in training may hold modules in evaluation mode, such as frozen norms, so one mode for the
    whole network would not do.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8).eval())
        >>> with evaluating(network):
        ...     network.training
        False
        >>> network.training, network[1].training
        (True, False)
    """
    training = [module for network in networks for module in network.modules() if module.training]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
