"""Both ends of an adaptive network on the same images, and what their stages give.

Shapes in this file::

    x       [B, C, S, S] images
    logits  [B, classes]
    h       [B, C, H, W], [B, H, W, C] or [B, tokens, C]: the output of a stage
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from pliant.methods.adaptive_depth.block import AdaptiveBlock
from pliant.methods.adaptive_depth.switch import find_depth
from pliant.objectives import Feature, stage_outputs


@dataclass(frozen=True)
class BothPasses:
    """What the whole network and the base network give for the same images.

    Attributes:
        logits: of the whole network, the super-net.
        base_logits: of the base network, in which every stage skips.
        stages: outputs of the whole network's stages, by number of the stage's flag.
        base_stages: of the base network's.
    """

    logits: Tensor
    base_logits: Tensor
    stages: dict[int, Feature]
    base_stages: dict[int, Feature]


def run_both(network: nn.Module, x: Tensor, stages: Iterable[int] | None = None) -> BothPasses:
    """Run the whole network and then the base network.

    Args:
        network: one adaptive network, or a module that holds one.
        x: its input.
        stages: numbers of the flags whose stages' outputs are kept; None: all.

    Raises:
        ValueError: `network` has no adaptive depth, or not these flags; or its forward does
            not reach a stage.

    Example:
        >>> import timm, torch, pliant
        >>> model = pliant.convert(timm.create_model("resnet20_cifar"), pliant.AdaptiveDepth())
        >>> both = run_both(model, torch.randn(2, 3, 32, 32))
        >>> [tuple(f.h.shape) for f in both.base_stages.values()]
        [(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]
    """
    depth = find_depth(network)
    blocks = [m for m in network.modules() if isinstance(m, AdaptiveBlock)]
    ends = {block.flag: (block, block.out_channels) for block in blocks}  # a stage's last
    logits = []
    with stage_outputs(network, ends, stages) as seen:
        for skip in (False, True):
            with depth.hold((skip,) * len(depth.skip)):
                logits.append(network(x))
    whole, base = ({n: found[i] for n, found in seen.items()} for i in range(2))
    return BothPasses(logits[0], logits[1], whole, base)
