"""What a processor gets wrong, told before a training runs into it: `warn_of_narrow_convolutions`.

Shapes: of a convolution's weight, [O, C/g, 1, 1].
"""

from __future__ import annotations

import logging

import torch
from torch import nn

NARROWEST = 8  # input channels from which on the gradient is right


def warn_of_narrow_convolutions(network: nn.Module) -> None:
    """Log a warning that names the convolutions whose gradient may crash on this processor.

    In the backward pass of a strided 1x1 convolution of a channels_last input with fewer than 8
    channels, oneDNN writes beyond its memory where the processor has AVX2 and no AVX-512; glibc then
    aborts the process ("corrupted double-linked list"). Seen with torch 2.15. Forward passes are right.

    Args:
        network: what will train in channels_last, on a CPU.

    Example:
        >>> warn_of_narrow_convolutions(nn.Conv2d(8, 16, 1, stride=2))  # wide enough: no warning
    """
    avx2 = torch.backends.cpu.get_cpu_capability() == "AVX2"
    if not avx2 or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    convolutions = [(path, m) for path, m in network.named_modules() if isinstance(m, nn.Conv2d)]
    narrow = [
        path
        for path, m in convolutions
        if m.kernel_size == (1, 1) and m.stride != (1, 1) and m.in_channels < NARROWEST
    ]
    if narrow:
        logging.getLogger(__name__).warning(
            "%s: a strided 1x1 convolution with fewer than %d input channels may crash in training on this "
            "processor (AVX2 without AVX-512) with channels_last=True; set channels_last=False or widen it",
            ", ".join(narrow),
            NARROWEST,
        )
