"""Full precision for small networks that decide: selectors and routers.

Ranking and routing need the digits that half precision and autocast would drop.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from pliant.parts import as_defined


def full_precision(x: Tensor) -> AbstractContextManager[None]:
    """No autocast for what follows on the device of `x`.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16), full_precision(torch.ones(1)):
        ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
        torch.float32
    """
    kind = "cpu" if x.is_meta else x.device.type  # there is no autocast on meta
    # Entering it when it is off would only cost time (and a graph node).
    off = torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if off else nullcontext()


def pooled(x: Tensor) -> Tensor:
    """Mean over all positions, at least float32: [B, C] from [B, C, H, W] or [B, C]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.dim() != 4:
        return x.to(wide)
    # Older ONNX exporters know no dtype of a mean: none is given where it changes nothing.
    return x.mean((2, 3)) if x.dtype == wide else x.mean((2, 3), dtype=wide)


def linear(x: Tensor, layer: nn.Module) -> Tensor:
    """Call `layer` in the precision of `x`: a linear layer, or what stands in its place (an adapter, say).

    Example:
        >>> halved = nn.Linear(2, 1).half()
        >>> linear(torch.ones(3, 2), halved).dtype
        torch.float32
    """
    weight = layer._parameters.get("weight")
    if weight is not None and weight.dtype == x.dtype:
        return cast("Tensor", layer(x))
    if as_defined(layer, nn.Linear) and not (layer._backward_hooks or layer._backward_pre_hooks):
        # Compilers and exporters know this better than a call with other weights.
        assert isinstance(layer, nn.Linear)
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.weight.to(x.dtype), bias)
    wider = {name: p.to(x.dtype) for name, p in layer.named_parameters() if p.is_floating_point()}
    return cast("Tensor", functional_call(layer, wider, (x,)) if wider else layer(x))
