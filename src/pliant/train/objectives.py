"""What is minimised: an objective gives named terms, whose sum is the loss.

Shapes: logits [B, classes]; targets int64 [B] (classes) or float [B, classes] (shares).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class Objective(Protocol):
    """A rule from outputs and targets to the terms of a loss."""

    def __call__(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
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
