"""What a state dict is made of, without its values: to compare two networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pliant._config import some

# (floating point?, shape); None: no tensor, or what a module keeps beside its tensors
Shapes = dict[str, tuple[bool, tuple[int, ...]] | None]
_EXTRA = "_extra_state"  # torch's name of it; its module checks it, and reads older forms too


def shapes(state: Mapping[str, Any]) -> Shapes:
    """Kind and shape of each entry."""
    return {
        k: (v.is_floating_point(), tuple(v.shape))
        if isinstance(v, Tensor) and not k.endswith(_EXTRA)
        else None
        for k, v in state.items()
    }


def difference(found: Shapes, expected: Shapes) -> str:
    """How the entries of a state dict differ from what they should be; empty if not."""
    parts = []
    for word, names in (
        ("missing", expected.keys() - found.keys()),
        ("unexpected", found.keys() - expected),
    ):
        if names:
            parts.append(f"{word} {some(names)}")
    for name in sorted(found.keys() & expected.keys()):
        if found[name] != expected[name]:
            parts.append(f"{name} is {_kind(found[name])} instead of {_kind(expected[name])}")
            break  # one tells; the others follow from the same cause
    return "; ".join(parts)


def _kind(shape: tuple[bool, tuple[int, ...]] | None) -> str:
    return "no tensor" if shape is None else f"{'float' if shape[0] else 'int'} {list(shape[1])}"


def ties(model: nn.Module) -> set[frozenset[str]]:
    """Names of the tensors that several modules share."""
    names: dict[int, set[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}
