"""What a depth is and where it holds: `Depth`, `Switch`.

A `Depth` lies in a network and has a default for all threads. What holds in one context (a
thread, an asyncio task) lies in a context variable, as a stack of `Held` for each `Depth`:
an immutable one, so a task that was started within a ``with`` keeps its depth when the
``with`` is left elsewhere.

No tensors here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from itertools import product
from types import TracebackType
from typing import Any, ClassVar

from torch import nn

from pliant.parts import Part

Skip = tuple[bool, ...]


class Held:
    """A depth that holds in one context.

    Attributes:
        skip: its flags.
        state: ``"pending"``: may yet become the default; ``"with"``; ``"statement"``: became
            the default within a ``with``, of which it holds the rest.
        alive: it holds.
    """

    def __init__(self, skip: Skip, state: str) -> None:
        self.skip, self.state, self.alive = skip, state, True


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
        for held in reversed(_stack(self)):
            if held.alive:
                return held.skip
        return self.skip

    def __deepcopy__(self, memo: dict[int, Any]) -> Depth:
        """A copy runs as the original does here: what holds in this context is its default."""
        copied = memo[id(self)] = type(self)(self.current())
        copied.training = self.training
        return copied

    def get_extra_state(self) -> list[bool]:
        """The default, for checkpoints."""
        return list(self.skip)

    def set_extra_state(self, state: Any) -> None:
        """Take the default of a checkpoint.

        Raises:
            ValueError: it has other flags than this network.
        """
        self.skip = check_skip(state, len(self.skip))

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"skip={self.skip}"


# What holds in this context, innermost last: replaced as a whole, never changed.
_HELD: ContextVar[dict[Depth, tuple[Held, ...]] | None] = ContextVar("pliant_depth", default=None)


def _stack(depth: Depth) -> tuple[Held, ...]:
    everything = _HELD.get()
    return () if everything is None else everything.get(depth, ())


def _put(depth: Depth, stack: tuple[Held, ...]) -> None:
    others = {d: s for d, s in (_HELD.get() or {}).items() if d is not depth}
    _HELD.set({**others, depth: stack} if stack else others)


class Switch:
    """What `set_depth` returns: a context manager, or, thrown away, the new default.

    Until it is entered or thrown away it holds for its own context alone, so that no other
    thread ever runs at the depth of a ``with``. Printed by an interactive prompt, which
    then keeps it, it becomes the default as well. It can be entered again.
    """

    def __init__(self, depth: Depth, skip: Skip) -> None:
        stack = _stack(depth)
        if stack and stack[-1].state == "pending":
            _publish(depth, stack[-1])  # kept in a variable, and followed by this one
        self._depth, self.skip = depth, skip
        self._entered: list[Held] = []
        self._made = Held(skip, "pending")
        _put(depth, (*_stack(depth), self._made))

    def __enter__(self) -> Skip:
        """Hold the depth; returns its flags."""
        held, stack = self._made, _stack(self._depth)
        mine = held.state == "pending" and held in stack
        if not mine:
            if held.state == "pending":
                held.alive = False  # made in another context, for this one
            _put(self._depth, (*stack, new := Held(self.skip, "with")))
        held.state = "with" if held.state == "pending" else held.state
        self._entered.append(held if mine else new)
        return self.skip

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        """What held before holds again."""
        stack = _stack(self._depth)
        here = [held for held in self._entered if held in stack]
        left = (here or self._entered)[-1]
        self._entered.remove(left)
        if not here:
            left.alive = False  # entered in another context, where it holds no longer
            return
        at = stack.index(left)
        end = at + 1
        while end < len(stack) and stack[end].state == "statement":
            end += 1  # what was set within the `with` has become the default
        _put(self._depth, stack[:at] + stack[end:])

    def __del__(self) -> None:
        if self._made.state == "pending":
            _publish(self._depth, self._made)

    def __repr__(self) -> str:
        if self._made.state == "pending":
            _publish(self._depth, self._made)
        return f"depth {self.skip}"


def _publish(depth: Depth, held: Held) -> None:
    """Make what a switch holds the default; within a ``with`` also for the rest of that."""
    depth.skip = held.skip
    held.state = "statement"
    stack = _stack(depth)
    if held not in stack:
        held.alive = False  # thrown away in another context
    elif not any(other.state == "with" and other.alive for other in stack):
        held.alive = False  # also where tasks took it over
        _put(depth, tuple(other for other in stack if other is not held))


def find_depth(model: nn.Module) -> Depth:
    """The one depth of a network.

    Raises:
        ValueError: it has none, or several.
    """
    found = [m for m in model.modules() if isinstance(m, Depth)]
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
    return found[0]


def check_skip(skip: object, flags: int | None = None) -> Skip:
    """Flags as a tuple.

    Args:
        skip: a sequence of flags.
        flags: how many there must be; None: any number.

    Raises:
        ValueError: another number of them, or something else than True and False.
    """
    many = "each stage that can skip" if flags is None else f"each of {flags} stages"
    if not isinstance(skip, (tuple, list)) or not all(isinstance(s, bool) for s in skip):
        raise ValueError(f"skip must hold True or False for {many}, not {skip!r}")
    if flags is not None and len(skip) != flags:
        raise ValueError(f"skip has {len(skip)} flags, {tuple(skip)}; the network has {flags}")
    return tuple(skip)


def check_skips(skips: Iterable[Sequence[bool]] | None, flags: int) -> list[Skip]:
    """Depths, each once, in the order given; all of them, the whole network first, for None.

    Raises:
        ValueError: there is none, or one is wrong (`check_skip`).

    Example:
        >>> check_skips(None, 1), check_skips([[True], (True,)], 1)
        ([(False,), (True,)], [(True,)])
    """
    if skips is None:
        return list(product((False, True), repeat=flags))
    found = [check_skip(list(skip), flags) for skip in skips]
    if not found:
        raise ValueError("skips is empty; name at least one depth, or leave it out for all")
    return list(dict.fromkeys(found))


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
