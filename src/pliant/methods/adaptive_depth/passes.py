"""Both ends of an adaptive network on the same images, and what their stages give.

Shapes in this file::

    x       [B, C, S, S] images
    logits  [B, classes]
    h       [B, C, H, W], [B, H, W, C] or [B, tokens, C]: the output of a stage
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pliant.methods.adaptive_depth.block import AdaptiveBlock
from pliant.methods.adaptive_depth.switch import find_depth
from pliant.objectives import Feature, channel_dim


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
    flags = len(depth.skip)
    wanted = tuple(range(flags)) if stages is None else tuple(stages)
    results = []
    for skip in (False, True):
        with depth.hold((skip,) * flags), stage_outputs(network, wanted) as features:
            logits: Tensor = network(x)
        lost = [n for n in wanted if n not in features]
        if lost:
            raise ValueError(f"the forward of {type(network).__name__} does not reach stage {lost[0]}")
        results.append((logits, features))
    (logits, whole), (base_logits, base) = results
    return BothPasses(logits, base_logits, whole, base)


@contextmanager
def stage_outputs(network: nn.Module, stages: Iterable[int]) -> Iterator[dict[int, Feature]]:
    """Collect what stages give while the block runs; the last forward counts.

    The network is hooked meanwhile, and as it was afterwards.

    Args:
        network: an adaptive network.
        stages: numbers of their flags.

    Raises:
        ValueError: the network has no such flag.
    """
    ends = {m.flag: m for m in network.modules() if isinstance(m, AdaptiveBlock)}  # a stage's last
    found: dict[int, Feature] = {}
    handles = []
    try:
        for n in stages:
            if n not in ends:
                raise ValueError(f"no stage {n}; the stages that can skip are 0 to {len(ends) - 1}")
            handles.append(ends[n].register_forward_hook(_keep(found, n)))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _keep(found: dict[int, Feature], n: int) -> Any:
    def hook(block: AdaptiveBlock, _args: Any, h: Tensor) -> None:
        found[n] = Feature(h, channel_dim(h, block.out_channels))

    return hook
