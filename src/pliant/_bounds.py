"""Bounds on what a small file may ask for: the network it describes is to be as large as its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

# Calls of torch that a network may take to be built, for each of its tensors and so many more. Those of
# pliant and timm take up to 17.
_CALLS, _SPARE = 100, 100


class Limit(TorchFunctionMode):
    """Refuse to build a network of far more layers than a file has tensors: it would not end."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.tensors = len(tensors)
        self.left = _CALLS * (_SPARE + self.tensors)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count a call: layers make and fill their tensors by some each."""
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"it has far more layers than the file has tensors, {self.tensors}")
        return func(*args, **(kwargs or {}))


def check_size(arguments: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Refuse numbers that no network of these tensors has: some constructors make a list as long."""
    values = sum(tensor.numel() for tensor in tensors.values())
    for name, value in arguments.items():
        if number := next((n for n in _numbers(value) if abs(n) > max(2**20, values)), None):
            raise ValueError(f"{name} has {number}, and the file has {values} values in all")


def _numbers(value: Any) -> Iterable[float]:
    """All numbers in a plain value."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple):
        return (n for v in value for n in _numbers(v))
    return (value,) if isinstance(value, (int, float)) else ()
