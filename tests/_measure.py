"""A small network to measure, and its image's size."""

from __future__ import annotations

from torch import nn

SMALL = (1, 8, 8)


def conv(width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width))
