"""Multiply-accumulates and parameters of a network: one honest figure each.

The project's MAC figure is that of convolutions and matrix products (kernel mixing
included), for one image: `torch.utils.flop_counter` divided by two. Norms,
activations, pools and additions count nothing. What a rule about speed chooses does not
enter: such a part says which of its forms counts. Papers count differently; their
conventions live where their tables are reproduced and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from pliant.evaluating import evaluating
from pliant.parts import parts


def count_parameters(model: nn.Module) -> int:
    """Number of learnable values, shared ones once.

    Example:
        >>> count_parameters(nn.Linear(3, 2))
        8
    """
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one image, on whatever device the model is.

    A part that chooses among forms of the same function by their speed says which of them counts
    (`pliant.parts.Part.counted`).

    Args:
        model: any network, also on the meta device (no arithmetic is done there).
        input_size: channels, height, width.

    Returns:
        Multiply-accumulates of convolutions and matrix products.

    Example:
        >>> count_macs(nn.Conv2d(3, 8, 3, padding=1), (3, 10, 10))
        21600
    """
    # The counter follows gradients to modules, and fails at a view of a parameter without a gradient.
    learning = [p for p in model.parameters() if p.requires_grad]
    with ExitStack() as counted, FlopCounterMode(display=False) as counter:
        for p in learning:
            counted.callback(p.requires_grad_, p.requires_grad)
            p.requires_grad_(False)
        for part in parts(model).values():
            counted.enter_context(part.counted())
        run_once(model, input_size)
    return int(counter.get_total_flops()) // 2


class _OnlyShapes(TorchFunctionMode):
    """On the meta device, pass over what counts nothing and leaves shape and type as they are.

    PyTorch finds the shape of a norm's output there by decomposing the norm in Python, which takes up to
    nine tenths of a forward's time.
    """

    _PASSED_OVER = frozenset({F.batch_norm, F.hardtanh})

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """The input itself for an operation that is passed over, else what the operation gives."""
        if func in self._PASSED_OVER and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def run_once(model: nn.Module, input_size: tuple[int, int, int]) -> None:
    """Run one image of zeros through, in evaluation; the modules' modes come back.

    On the meta device batch norms and clipped activations return their input: its shape is theirs.

    Args:
        model: any network, on whatever device it is.
        input_size: channels, height, width.

    Example:
        >>> run_once(nn.Conv2d(3, 8, 3), (3, 10, 10))
    """
    like = next(model.parameters(), torch.empty(0))
    x = torch.zeros(1, *input_size, device=like.device, dtype=like.dtype)
    with evaluating(model), torch.no_grad(), _OnlyShapes():
        model(x)
