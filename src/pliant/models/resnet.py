"""Plain ResNets for large images: block and layers of each depth (Table 5 of arXiv 2409.17016).

timm has some of them under the same names; its ``resnet26`` is another one (bottlenecks of 2 2 2 2).
None is registered by itself: these are what named networks are converted from.
"""

from __future__ import annotations

from functools import partial

from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from pliant.models._build import PlainNetwork

_LAYERS = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet26": (BasicBlock, (2, 2, 3, 4)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet42": (BasicBlock, (3, 3, 6, 6)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet75": (Bottleneck, (3, 4, 14, 3)),
    "resnet86": (Bottleneck, (3, 4, 18, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}

RESNETS = {
    name: PlainNetwork(build=partial(ResNet, block=block, layers=layers))
    for name, (block, layers) in _LAYERS.items()
}
