"""Which depth holds where: `Depth`, and the flags that callers give.

A `Depth` lies in a network and has a default for all threads. What a ``with at_depth(...)``
holds lies in a context variable, so other threads and tasks do not see it, and tasks that are
started in the ``with`` keep it.

Shapes: flags, bool [flags], in state dicts; nothing else here is a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import product
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from pliant.parts import Part

Skip = tuple[bool, ...]
SkipLike = str | Sequence[bool]  # "TTFF", or flags


class Depth(Part):
    """The depth that a network's blocks read: one flag for each stage that can skip.

    Attributes:
        skip: the default; what holds here and now is `current`. Checkpoints keep it.
    """

    switches: ClassVar[bool] = True

    def __init__(self, skip: Skip) -> None:
        super().__init__()
        self.skip = skip

    def no_export(self) -> str:
        """A file has one depth; see `Part.no_export`."""
        return (
            "switches the network's depth, and a file has one: export pliant.subnet(model, skip), or "
            "several depths by pliant.export_depths"
        )

    def current(self) -> Skip:
        """The flags that hold in this context."""
        for depth, skip in reversed(_HELD.get()):
            if depth is self:
                return skip
        return self.skip

    @contextmanager
    def hold(self, skip: Skip) -> Iterator[Skip]:
        """Let `skip` hold in this context, until the ``with`` is left."""
        mine = (self, skip)
        _HELD.set((*_HELD.get(), mine))
        try:
            yield skip
        finally:
            # By identity: generators leave their `with` in any order.
            _HELD.set(tuple(held for held in _HELD.get() if held is not mine))

    def __deepcopy__(self, memo: dict[int, Any]) -> Depth:
        """A copy runs as the original does here: what holds in this context is its default."""
        copied = memo[id(self)] = type(self)(self.current())
        copied.training = self.training
        return copied

    def get_extra_state(self) -> Tensor:
        """The default, for checkpoints: bool [flags]. Many tools expect tensors alone in a state dict."""
        return torch.tensor(self.skip, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        """Take the default of a checkpoint: a tensor of any type, or a list, as it was once.

        Raises:
            ValueError: it has other flags than this network.
        """
        flags = state.bool().tolist() if isinstance(state, Tensor) else state
        self.skip = check_skip(flags, len(self.skip))

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"skip={self.skip}"


# What holds in this context, innermost last: replaced as a whole, never changed.
_HELD: ContextVar[tuple[tuple[Depth, Skip], ...]] = ContextVar("pliant_depth", default=())


class Default(tuple[bool, ...]):
    """The flags that `set_depth` made the default; in a ``with``, an error that says what to write."""

    __slots__ = ()

    def __enter__(self) -> NoReturn:
        raise TypeError(
            f"set_depth has made {depth_name(self)!r} the default of all threads and is no context "
            f"manager; for a depth that holds in a block only, write: with at_depth(model, "
            f"{depth_name(self)!r}):"
        )

    def __exit__(self, *_: object) -> None:
        """Not reached: Python looks for it before it calls ``__enter__``."""


class Switched(nn.Module):
    """A module in which nothing but a child ``depth`` of its own can be a `Depth`.

    A search need not look further into it, so that switching a network costs microseconds.
    """


def find_depth(model: nn.Module) -> Depth:
    """The one depth of a network.

    Raises:
        ValueError: it has none, or several.
    """
    found: dict[int, Depth] = {}
    left: list[nn.Module | None] = [model]
    while left:  # not by `modules`: it enters every layer of every block
        module = left.pop()
        if isinstance(module, Depth):
            found[id(module)] = module
        elif isinstance(module, Switched):
            left.append(module._modules.get("depth"))
        elif module is not None:
            left.extend(module._modules.values())
    if not found:
        raise ValueError(
            f"this {type(model).__name__} has no adaptive depth: convert it by AdaptiveDepth() first; "
            f"what was cut out, traced or exported has one depth for ever: switch the network that it "
            f"came from, and cut or export that again"
        )
    if len(found) > 1:
        raise ValueError(
            f"this {type(model).__name__} holds {len(found)} networks of adaptive depth; give one of them"
        )
    (depth,) = found.values()
    return depth


def check_skip(skip: object, flags: int | None = None) -> Skip:
    """Flags as a tuple.

    Args:
        skip: a letter for each flag (``"TTFF"``), or a sequence of flags; True (T) skips.
        flags: how many there must be; None: any number but 0.

    Raises:
        ValueError: another number of them, or something else than flags.

    Example:
        >>> check_skip("TF"), check_skip([True, False])
        ((True, False), (True, False))
    """
    found = [_LETTERS.get(letter) for letter in skip] if isinstance(skip, str) else skip
    if not isinstance(found, Sequence) or not found or not all(isinstance(flag, bool) for flag in found):
        raise ValueError(
            f"skip is {skip!r}; give one flag for each stage that can skip, {_such(flags)} (True skips)"
        )
    if flags not in (None, len(found)):
        raise ValueError(
            f"skip has {len(found)} flags, {skip!r}; this network has {flags}: give {flags}, {_such(flags)}"
        )
    return tuple(found)


def _such(flags: int | None) -> str:
    """Flags as an example, in both forms."""
    example = "TTFF" if flags is None else "T" * ((flags + 1) // 2) + "F" * (flags // 2)
    return f"such as {example!r} or {tuple(letter == 'T' for letter in example)}"


def check_skips(skips: Iterable[SkipLike] | None, flags: int) -> list[Skip]:
    """Depths, each once, in the order given; all of them, the whole network first, for None.

    Raises:
        ValueError: there is none, or one is wrong (`check_skip`).

    Example:
        >>> check_skips(None, 1), check_skips(["T", (True,)], 1)
        ([(False,), (True,)], [(True,)])
    """
    if skips is None:
        return list(product((False, True), repeat=flags))
    if isinstance(skips, str):
        raise ValueError(f"skips is {skips!r}; give a list of depths, such as [{skips!r}]")
    found = [check_skip(skip, flags) for skip in skips]
    if not found:
        raise ValueError("skips is empty; name at least one depth, or leave it out for all")
    return list(dict.fromkeys(found))


_LETTERS = {"T": True, "F": False}


def depth_name(skip: Skip) -> str:
    """A letter for each flag, as the paper writes depths.

    Example:
        >>> depth_name((False, False, True, True))
        'FFTT'
    """
    return "".join("FT"[flag] for flag in skip)


def depth_role(skip: Skip) -> str:
    """``"super"`` for the whole network, ``"base"`` for the base network, else empty."""
    return "base" if all(skip) else "" if any(skip) else "super"
