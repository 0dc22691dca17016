"""Which channels a Mixture-of-Depths network selects, by block and class.

Section 5.1 and figure 4 of *CNN Mixture-of-Depths*: how often each channel is among
the selected ones of a block, for the samples of a class, as a share of all selections
in that block.

Shapes::

    C  channels of a block   counts  [classes, C]  selections, int64
    k  selected per sample   share   [classes, C]  rows sum to one
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pliant.methods.mixture_of_depths import MoDBlock
from research.analysis._passes import Hook, labelled, watched


@dataclass(frozen=True)
class SelectionFrequency:
    """How often channels were selected.

    Attributes:
        classes: names of the classes, in label order.
        counts: for each block's path, [classes, C] selections of each channel.
        samples: [classes] samples that were seen.
        k: for each block's path, channels selected for one sample.
    """

    classes: tuple[str, ...]
    counts: dict[str, Tensor]
    samples: Tensor
    k: dict[str, int]

    def share(self, block: str) -> Tensor:
        """Each channel's share of a class's selections, [classes, C]; rows sum to 1.

        The row of a class without samples is zero.
        """
        counts = self.counts[block].double()
        return counts / counts.sum(1, keepdim=True).clamp(min=1)

    def overall(self, block: str) -> Tensor:
        """Each channel's share over all samples, [C]; sums to 1 (figure 4a)."""
        counts = self.counts[block].sum(0).double()
        return counts / counts.sum().clamp(min=1)

    def always(self, block: str) -> Tensor:
        """Channels selected for every sample, which need no selector (section 5.1)."""
        return (self.counts[block].sum(0) == self.samples.sum()).nonzero().flatten()

    def never(self, block: str) -> Tensor:
        """Channels selected for no sample: they could be pruned from the selection."""
        return (self.counts[block].sum(0) == 0).nonzero().flatten()


@torch.inference_mode()
def selection_frequency(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    classes: Sequence[str],
    *,
    per_class: int | None = None,
) -> SelectionFrequency:
    """Count which channels each Mixture-of-Depths block selects, by class.

    Args:
        model: a network with blocks that select (``selection`` learned or random).
        batches: pairs of images [B, channels, H, W], normalised as the network wants,
            and labels [B], whole numbers.
        classes: names, one for each label.
        per_class: at most so many samples of a class (the paper: 50); None takes all.

    Raises:
        ValueError: no block of the network selects, or a label has no name; or `per_class`
            is not positive.

    Example:
        >>> import timm, pliant
        >>> model = timm.create_model("resnet20_cifar_mod")
        >>> data = [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 1, 0]))]
        >>> found = selection_frequency(model, data, ["cat", "dog"])
        >>> found.counts["layer3.1"].sum(1)  # 2 samples of each class, k = 4
        tensor([8, 8])
    """
    blocks = {
        path: block
        for path, block in model.named_modules()
        if isinstance(block, MoDBlock) and block.selector is not None
    }
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no Mixture-of-Depths block that selects channels; "
            f"selection must be 'learned', 'random' or 'fixed'"
        )
    counts = {path: torch.zeros(len(classes), b.channels, dtype=torch.long) for path, b in blocks.items()}
    samples = torch.zeros(len(classes), dtype=torch.long)
    picked: dict[str, Tensor] = {}

    def remember(path: str) -> Hook:
        def hook(_module: nn.Module, _args: Any, output: tuple[Any, Tensor]) -> None:
            picked[path] = output[1]

        return hook

    hooks = [(b.selector, remember(p)) for p, b in blocks.items() if b.selector]
    like = next(model.parameters())
    with watched(model, hooks):
        for images, labels, _ in labelled(batches, len(classes), per_class):
            model(images.to(like.device, like.dtype))
            samples += labels.bincount(minlength=len(classes))
            for path, index in picked.items():
                index = index.cpu().expand(len(labels), -1)  # fixed selections are [k]
                counts[path].index_put_((labels[:, None], index), torch.tensor(1), accumulate=True)
    return SelectionFrequency(tuple(classes), counts, samples, {p: b.k for p, b in blocks.items()})
