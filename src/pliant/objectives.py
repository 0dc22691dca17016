"""What is minimised: an objective turns outputs and targets into named terms, whose sum is the loss.

Shapes in this file::

    logits  [B, classes]
    target  int64 [B] (classes) or float [B, classes] (shares)
    h       [B, C, H, W], [B, H, W, C] or [B, tokens, C]: the output of a stage
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Protocol

import torch.nn.functional as F
from pydantic import AfterValidator
from torch import Tensor, nn

from pliant._options import Numbers


class Objective(Protocol):
    """A rule from outputs and targets to the terms of a loss."""

    def __call__(self, outputs: Any, target: Tensor) -> dict[str, Tensor]:
        """Name each term, a scalar. Their sum is minimised; each is logged and watched."""


@dataclass(frozen=True)
class CrossEntropy:
    """Cross entropy, with smoothed labels if asked; targets may be mixed already.

    Args:
        smoothing: share of the target that is spread over all classes, in [0, 1).

    Example:
        >>> import torch
        >>> terms = CrossEntropy(smoothing=0.1)(torch.zeros(2, 4), torch.tensor([0, 3]))
        >>> {name: round(float(term), 4) for name, term in terms.items()}
        {'cross_entropy': 1.3863}
    """

    smoothing: float = 0.0

    def __call__(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """One term, the mean over the batch, computed in float32."""
        return {"cross_entropy": F.cross_entropy(logits.float(), target, label_smoothing=self.smoothing)}


class ManyPasses(ABC):
    """An objective that runs its network several times on the same images.

    A method whose network is several networks (one for each depth, say) trains them by such an
    objective. Each pass has an ending, by which its terms and accuracies are named.

    Attributes:
        endings: ending of each pass, in the order of `pass_logits`; the first is empty and is that of
            the network itself.
    """

    endings: ClassVar[tuple[str, ...]]

    @property
    @abstractmethod
    def taught(self) -> dict[str, float]:
        """Weight of each pass that learns from its labels, by ending."""

    @abstractmethod
    def check(self, network: nn.Module) -> None:
        """Refuse a network that the objective cannot train.

        Raises:
            ValueError: says why it cannot, and what to do.
        """

    @abstractmethod
    def run(self, network: nn.Module, x: Tensor) -> Any:
        """All passes over images `x` [B, C, H, W]."""

    @abstractmethod
    def pass_logits(self, outputs: Any) -> tuple[Tensor, ...]:
        """Logits of each pass, from what `run` returned."""

    @abstractmethod
    def __call__(self, outputs: Any, target: Tensor) -> dict[str, Tensor]:
        """The terms, from what `run` returned."""


@dataclass(frozen=True)
class Feature:
    """What a stage gives after its last block.

    Attributes:
        h: the feature map, or tokens.
        dim: its dimension of channels.
    """

    h: Tensor
    dim: int


def channel_dim(h: Tensor, channels: int) -> int:
    """The dimension of channels: the last of tokens and channels-last maps, else 1.

    Raises:
        ValueError: neither has so many channels.

    Example:
        >>> import torch
        >>> channel_dim(torch.zeros(2, 8, 4, 4), 8), channel_dim(torch.zeros(2, 4, 4, 8), 8)
        (1, 3)
        >>> channel_dim(torch.zeros(2, 8, 8), 8)
        2
    """
    # A map whose width is its number of channels is taken as [B, C, H, W], torch's own form.
    dims = (1, 3) if h.dim() == 4 else (h.dim() - 1,)
    for dim in dims:
        if h.shape[dim] == channels:
            return dim
    raise ValueError(f"a stage's output of shape {tuple(h.shape)} has no dimension of {channels} channels")


Seen = dict[int, list[Feature]]  # by number of the stage, one feature for each forward


@contextmanager
def stage_outputs(
    network: nn.Module, ends: Mapping[int, tuple[nn.Module, int]], stages: Iterable[int] | None = None
) -> Iterator[Seen]:
    """Collect what stages give while the block runs. Nothing stays hooked.

    Args:
        network: the network whose forward runs in the block.
        ends: last block of each stage, and its output channels, by the stage's number.
        stages: numbers of the stages; None: all.

    Raises:
        ValueError: `network` has no such stage, or its forward did not reach one.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3))
        >>> with stage_outputs(network, {0: (network[0], 8)}) as seen:
        ...     _ = network(torch.zeros(1, 3, 5, 5))
        >>> [feature.h.shape for feature in seen[0]]
        [torch.Size([1, 8, 3, 3])]
    """
    seen: Seen = {}
    handles = []

    def keep(n: int, _block: nn.Module, _args: Any, h: Tensor) -> None:
        seen[n].append(Feature(h, channel_dim(h, ends[n][1])))

    try:
        for n in ends if stages is None else stages:
            if n not in ends:
                raise ValueError(f"no stage {n} in {type(network).__name__}; it has 0 to {max(ends)}")
            seen[n] = []
            handles.append(ends[n][0].register_forward_hook(partial(keep, n)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()
    if lost := [n for n, found in seen.items() if not found]:
        raise ValueError(f"the forward of {type(network).__name__} does not reach stage {lost[0]}")


def _each_once(stages: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(stages)) != len(stages):
        raise ValueError(f"give each number once, not {stages}")
    return stages


StageNumbers = Annotated[Numbers, AfterValidator(_each_once)]  # an option's


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence ``KL(softmax(p) || softmax(q))`` over all positions.

    Args:
        p: teacher [B, C, ...], in front of the softmax over C.
        q: student [B, C, ...], in front of the softmax over C.

    Returns:
        A scalar: the sum over C, averaged over B and every position. (``batchmean`` of torch
        would multiply it by the number of positions.)

    Example:
        >>> import torch
        >>> p = torch.tensor([0.75, 0.25]).log().view(1, 2, 1, 1)
        >>> q = torch.tensor([0.5, 0.5]).log().view(1, 2, 1, 1)
        >>> round(float(divergence(p, q)), 4)  # 0.75 log 1.5 + 0.25 log 0.5
        0.1308
    """
    log_p, log_q = F.log_softmax(p, 1), F.log_softmax(q, 1)
    total = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return total * p.shape[1] / p.numel()
