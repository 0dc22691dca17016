"""One pass of a network over labelled images, watched by hooks, that leaves it as it was.

Shapes in this file::

    B  batch    images  [B, channels, H, W]   labels  int64 [B]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pliant.evaluating import evaluating

Hook = Callable[[nn.Module, Any, Any], None]


@contextmanager
def watched(model: nn.Module, hooks: Iterable[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """Put `model` into evaluation mode, with forward hooks on some of its modules.

    After the block, an error in it or not, the hooks are gone and every module is in the
    mode that it was in.

    Example:
        >>> seen = []
        >>> net = nn.Sequential(nn.ReLU()).train()
        >>> with watched(net, [(net[0], lambda module, args, output: seen.append(output))]):
        ...     _ = net(torch.tensor([-1.0, 2.0]))
        >>> seen, net.training
        ([tensor([0., 2.])], True)
    """
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        with evaluating(model):
            yield
    finally:
        for handle in handles:
            handle.remove()


def labelled(
    batches: Iterable[tuple[Tensor, Tensor]], classes: int, per_class: int | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Go through batches, with a check of their labels; at most `per_class` images of a class.

    Args:
        batches: pairs of images [B, channels, H, W] and labels [B].
        classes: labels are from 0 to one less.
        per_class: the first so many images of each class are taken; None takes all.

    Yields:
        Images, labels, and numbers of the images, counted from 0 over all of `batches`.
        Labels and numbers are on the CPU. A batch of which nothing is taken is left out.

    Raises:
        ValueError: labels are not whole numbers, one for each image, from 0 to `classes`
            less one; or `per_class` is not positive.

    Example:
        >>> x, y = torch.zeros(4, 3, 8, 8), torch.tensor([0, 1, 1, 1])
        >>> [(b.tolist(), c.tolist()) for _, b, c in labelled([(x, y), (x, y)], 2, per_class=2)]
        [([0, 1, 1], [0, 1, 2]), ([0], [4])]
    """
    if per_class is not None and per_class < 1:
        raise ValueError(f"per_class must be at least 1, or None for all images, not {per_class!r}")
    taken = [0] * classes
    start = 0
    for images, labels in batches:
        labels = labels.cpu()
        if labels.shape != images.shape[:1] or labels.is_floating_point():
            raise ValueError(
                f"labels must be whole numbers, one for each image: {len(images)} images came with "
                f"labels of shape {tuple(labels.shape)} and {labels.dtype}"
            )
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(
                f"a label of {int(labels.min())} to {int(labels.max())} has no name: "
                f"{classes} classes were given"
            )
        kept = []
        for i, label in enumerate(labels.tolist()):
            if per_class is None or taken[label] < per_class:
                taken[label] += 1
                kept.append(i)
        here = torch.tensor(kept, dtype=torch.long)
        if kept:
            whole = len(kept) == len(labels)
            yield images if whole else images[here.to(images.device)], labels[here].long(), here + start
        start += len(labels)
