"""Which channels a Mixture-of-Depths block processes, and what their scores are.

A selector takes a feature map, or its means over positions, and gives the scores and the index of
the k channels that are processed.

Shapes in this file::

    B  batch             x       [B, C, H, W] or [B, C]  feature map, or its means
    C  channels          logits  [B, C]                  relevance of each channel, at least float32
    k  processed         scores  [B, k]                  sigmoids of the k largest logits
    r  hidden units      index   [B, k] or [k]           channels that are processed, int64
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.parts import Part, Ranking
from pliant.precision import full_precision, linear, pooled

# Options of `pliant.MixtureOfDepths`, which explains them.
Order = Literal["score", "index"]
Fusion = Literal["first", "last", "original", "replace"]


class ChannelSelector(Part):
    """Rank the channels of a feature map and pick the best k (section 3.1, figure 2).

    GAP -> Linear(C, r) -> ReLU -> Linear(r, C), without norm and bias. Half precision and bfloat16
    are promoted to float32, under autocast too, because ranking needs the digits. The logits are
    ranked, because saturated sigmoids tie.

    Weights start as PyTorch's, but each hidden unit's sign is chosen so that its weights sum to at
    least zero: pooled activations are not negative, so the unit starts active. A narrow block has
    few hidden units; otherwise all of them are often silent for every input and never learn.

    Args:
        channels: C.
        k: number of channels that are picked.
        hidden: r, the width of the hidden layer.
        order: ``"score"``: best first; ``"index"``: as the channels stand in `x`.

    Example:
        >>> scores, index = ChannelSelector(8, 2, 4)(torch.rand(3, 8, 5, 5))
        >>> scores.shape, index.shape
        (torch.Size([3, 2]), torch.Size([3, 2]))
    """

    in_float = True  # 256 values are too few to rank channels by

    def __init__(self, channels: int, k: int, hidden: int, order: Order = "score") -> None:
        super().__init__()
        self.k, self.order = k, order
        self.fc1 = nn.Linear(channels, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, channels, bias=False)
        with torch.no_grad():
            total = self.fc1.weight.sum(1, keepdim=True)
            self.fc1.weight.copy_(torch.where(total < 0, -self.fc1.weight, self.fc1.weight))

    def logits(self, x: Tensor) -> Tensor:
        """Return the relevance of each channel before the sigmoid, [B, C], in at least float32."""
        with full_precision(x):
            return linear(F.relu(linear(pooled(x), self.fc1)), self.fc2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores [B, k] and index [B, k]; `x` is a feature map [B, C, H, W] or its means [B, C]."""
        top, index = best(self.logits(x), self.k, self.order)
        return top.sigmoid(), index

    def ranking(self) -> Ranking:
        """How it selects; see `Part.ranking`."""
        return Ranking(self.k, self.order == "index", self.logits, self._outcome)

    def _outcome(self, logits: Tensor, channels: Tensor) -> tuple[Tensor, Tensor]:
        return logits.gather(1, channels).sigmoid(), channels

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"k={self.k}, order={self.order!r}"


class RandomSelector(nn.Module):
    """Pick k channels at random, without scores: the paper's MoD50-rand.

    Args:
        channels: C.
        k: number of channels that are picked.
        fixed: draw once, now, instead of afresh for each sample and forward.
        order: ``"score"`` keeps the random order, ``"index"`` sorts.

    Example:
        >>> scores, index = RandomSelector(8, 2, fixed=False)(torch.rand(3, 8, 5, 5))
        >>> scores, index.shape
        (None, torch.Size([3, 2]))
    """

    index: Tensor | None

    def __init__(self, channels: int, k: int, fixed: bool, order: Order = "score") -> None:
        super().__init__()
        self.channels, self.k, self.order = channels, k, order
        drawn = torch.randperm(channels)[:k] if fixed else None
        if drawn is not None and order == "index":
            drawn = drawn.sort().values
        self.register_buffer("index", drawn)

    def forward(self, x: Tensor) -> tuple[None, Tensor]:
        """Return no scores, and index: [k] if it was drawn once, else [B, k]."""
        if self.index is not None:
            return None, self.index
        # The default generator: one of our own would break graphs.
        index = torch.rand(x.shape[0], self.channels, device=x.device).topk(self.k, dim=1).indices
        return None, index.sort(dim=1).values if self.order == "index" else index

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"k={self.k}, fixed={self.index is not None}, order={self.order!r}"


def best(logits: Tensor, k: int, order: Order) -> tuple[Tensor, Tensor]:
    """Return the k largest logits and their channels, both [B, k], best first or by channel.

    Example:
        >>> best(torch.tensor([[1.0, 3.0, 2.0, 4.0]]), 3, "index")
        (tensor([[3., 2., 4.]]), tensor([[1, 2, 3]]))
    """
    # sorted=True: unsorted, engines return different orders for the same values.
    top, index = logits.topk(k, dim=1, sorted=True)
    if order == "index":
        index, rank = index.sort(dim=1)
        top = top.gather(1, rank)
    return top, index
