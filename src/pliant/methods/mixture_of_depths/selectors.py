"""Which channels a Mixture-of-Depths block processes, and what their scores are.

A selector takes a feature map, or its means, and gives scores and index. Scores are what the
block multiplies by: those of the channels that are processed, of all channels (``gate="map"``), or
None. Both have a first dimension for the batch, unless they are the same for every sample.

Shapes in this file::

    B  batch             x       [B, C, H, W] or [B, C]  feature map, or its means
    C  channels          logits  [B, C] or [1, C]        relevance of the channels
    k  processed         scores  [B, k], [k] or [B, C]   sigmoids of logits, at least float32
    r  hidden units      index   [B, k] or [k]           channels that are processed, int64
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.parts import Part, Ranking
from pliant.precision import full_precision, linear, pooled
from pliant.threaded import arrived

Order = Literal["score", "index"]
Gate = Literal["output", "map", "none"]

SELECTION = "selection"  # the name under which selections are threaded


class Scorer(Part):
    """Score the channels of a feature map (section 3.1, figure 2).

    GAP -> Linear(C, r) -> ReLU -> Linear(r, C), without norm, and without bias unless asked for. Half
    and bfloat16 are promoted to float32, under autocast too, because ranking needs the digits.

    Weights start as PyTorch's, but each hidden unit's sign is chosen so that its weights
    sum to at least zero: pooled activations are not negative, so it starts active. Of the
    few units that a narrow block has, otherwise all are often silent for every input, and
    then nothing is ever learned.

    Args:
        channels: C.
        hidden: width of the hidden layer.
        bias: add one learned number to each channel's logit, from zero on.
        temperature: that logits are divided by.
    """

    def __init__(self, channels: int, hidden: int, *, bias: bool = False, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature
        self.fc1 = nn.Linear(channels, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, channels, bias=bias)
        with torch.no_grad():
            total = self.fc1.weight.sum(1, keepdim=True)
            self.fc1.weight.copy_(torch.where(total < 0, -self.fc1.weight, self.fc1.weight))
        if bias:
            nn.init.zeros_(self.fc2.bias)

    def logits(self, x: Tensor) -> Tensor:
        """The channels' relevance before the sigmoid, [B, C], at least float32."""
        with full_precision(x):
            logits = linear(F.relu(linear(pooled(x), self.fc1)), self.fc2)
        return logits if self.temperature == 1 else logits / self.temperature

    def upper(self) -> tuple[Tensor, Tensor | None]:
        """The second layer's weight [C, r] and bias [C], the temperature folded into them."""
        weight, bias = self.fc2.weight, cast("Tensor | None", self.fc2.bias)
        if self.temperature == 1:
            return weight, bias
        return weight / self.temperature, None if bias is None else bias / self.temperature


class ChannelSelector(Scorer):
    """Rank the channels of a feature map and pick the best k.

    Ranks the logits: saturated sigmoids tie.

    Args:
        channels: C.
        k: how many are picked.
        hidden: width of the hidden layer.
        order: ``"score"`` or ``"index"``.
        gate: what its scores are for; see `pliant.MixtureOfDepths`.
        bias: as for `Scorer`.
        temperature: likewise.
    """

    def __init__(
        self,
        channels: int,
        k: int,
        hidden: int,
        order: Order = "score",
        gate: Gate = "output",
        *,
        bias: bool = False,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(channels, hidden, bias=bias, temperature=temperature)
        self.k, self.order, self.gate = k, order, gate

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return scores, [B, k] or what the gate wants, and index [B, k] for `x`.

        `x` is a feature map [B, C, H, W], or its means [B, C].
        """
        logits = self.logits(x)
        top, index = best(logits, self.k, self.order)
        if self.gate == "map":
            return gates(logits), index
        return (top.sigmoid() if self.gate == "output" else None), index

    def ranking(self) -> Ranking:
        """How it selects; see `Part.ranking`."""
        return Ranking(self.k, self.order == "index", self.logits, self._outcome)

    def _outcome(self, logits: Tensor, channels: Tensor) -> tuple[Tensor | None, Tensor]:
        if self.gate == "map":
            return gates(logits), channels
        return (logits.gather(1, channels).sigmoid() if self.gate == "output" else None), channels

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"k={self.k}, order={self.order!r}"


class FirstSelector(Scorer):
    """Score all channels for a gate, and process the first k: the control of ``gate="map"``.

    Args:
        channels: C.
        k: how many are processed.
        hidden: width of the hidden layer.
        bias: as for `Scorer`.
        temperature: likewise.
    """

    index: Tensor

    def __init__(
        self, channels: int, k: int, hidden: int, *, bias: bool = False, temperature: float = 1.0
    ) -> None:
        super().__init__(channels, hidden, bias=bias, temperature=temperature)
        self.register_buffer("index", torch.arange(k))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return gates [B, C], and index [k]."""
        return gates(self.logits(x)), self.index


class RandomSelector(nn.Module):
    """Pick k channels at random, without scores: the paper's MoD50-rand.

    Args:
        channels: C.
        k: how many are picked.
        fixed: draw once, now, instead of afresh for each sample and forward.
        order: ``"score"`` keeps the random order, ``"index"`` sorts.
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
        """Return no scores, and index [k] when fixed, else [B, k]."""
        if self.index is not None:
            return None, self.index
        # The default generator: one of our own would break graphs.
        index = torch.rand(x.shape[0], self.channels, device=x.device).topk(self.k, dim=1).indices
        return None, index.sort(dim=1).values if self.order == "index" else index

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"k={self.k}, fixed={self.index is not None}, order={self.order!r}"


class StaticSelector(nn.Module):
    """Pick the same k channels for every input, and learn which: one logit for each channel.

    Once trained it is constant: `constant` gives it without the ranking.

    Args:
        channels: C.
        k: how many are picked.
        order: ``"score"`` or ``"index"``.
        scored: give the sigmoids of the logits as scores; else none.
        temperature: that logits are divided by.
    """

    def __init__(
        self,
        channels: int,
        k: int,
        order: Order = "score",
        *,
        scored: bool = True,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.k, self.order, self.scored = k, order, scored
        # Not equal: topk would pick among ties as it likes.
        self.relevance = nn.Parameter(0.1 * torch.randn(channels))

    def logits(self, _x: Tensor) -> Tensor:
        """The channels' relevance, [1, C], at least float32."""
        wide = torch.promote_types(self.relevance.dtype, torch.float32)
        return self.relevance.to(wide)[None] / self.temperature

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return scores [k] or None, and index [k]."""
        top, index = best(self.logits(x), self.k, self.order)
        return (top[0].sigmoid() if self.scored else None), index[0]

    def constant(self) -> ConstantSelector:
        """The selection as it is now, for inference.

        Example:
            >>> selector = StaticSelector(4, 2)
            >>> with torch.no_grad():
            ...     _ = selector.relevance.copy_(torch.tensor([0.0, 3.0, 1.0, 2.0]))
            >>> selector.constant().index
            tensor([1, 3])
        """
        with torch.no_grad():
            return ConstantSelector(*self(self.relevance))

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"k={self.k}, order={self.order!r}, scored={self.scored}"


class ConstantSelector(nn.Module):
    """A selection that was learned, and is fixed now.

    Args:
        scores: [k] or None.
        index: [k].
    """

    scores: Tensor | None
    index: Tensor

    def __init__(self, scores: Tensor | None, index: Tensor) -> None:
        super().__init__()
        self.register_buffer("scores", scores)
        self.register_buffer("index", index)

    def forward(self, _x: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return scores [k] or None, and index [k]."""
        return self.scores, self.index


class SharedSelection(nn.Module):
    """No selector: the selection that an earlier block of the stage threaded through the forward.

    Example:
        >>> from pliant.threaded import thread
        >>> x = thread(torch.zeros(1, 4, 2, 2), SELECTION, (None, torch.tensor([[3, 1]])))
        >>> SharedSelection()(x)
        (None, tensor([[3, 1]]))
    """

    def forward(self, x: Tensor) -> Any:
        """What came with the feature map `x` [B, C, H, W].

        Scores [B, k] or what the gate wants, and index [B, k]; in an exported form, what that makes
        of them.

        Raises:
            RuntimeError: nothing came.
        """
        return arrived(x, SELECTION)


def best(logits: Tensor, k: int, order: Order) -> tuple[Tensor, Tensor]:
    """The k largest logits and their channels, both [B, k], best first or by channel.

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


def gates(logits: Tensor) -> Tensor:
    """Twice the sigmoids, so that logits of zero leave a feature map as it is.

    Example:
        >>> gates(torch.zeros(1, 2))
        tensor([[1., 1.]])
    """
    return 2 * logits.sigmoid()


def relaxed(logits: Tensor, index: Tensor) -> Tensor:
    """A soft form of the selection, for its gradient: SoftSort's rows of the best k.

    Prillo and Eisenschlos, *SoftSort*, arXiv 2006.16038: the row of a rank is the softmax over
    channels of how near their logits are to the logit of that rank.

    Args:
        logits: [B, C].
        index: channels in the order in which they are processed, [B, k].

    Returns:
        [B, k, C]; rows sum to one, and are largest at the channel that is selected.

    Example:
        >>> relaxed(torch.tensor([[0.0, 9.0, 4.0]]), torch.tensor([[1]])).argmax(2)
        tensor([[1]])
    """
    top = logits.gather(1, index)
    return (-(top[:, :, None] - logits[:, None, :]).abs()).softmax(2)
