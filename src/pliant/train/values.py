"""Values of options: held against their type, kept as JSON has them, and read from text."""

from __future__ import annotations

import ast
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """``(int, None)`` for ``int | None``."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _wanted(hint: Any) -> str:
    """A type, in words."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    parts = []
    for one in _alternatives(hint):
        if get_origin(one) is Literal:
            parts.append("one of " + ", ".join(get_args(one)))
        else:
            parts.append("none" if one is type(None) else words.get(one, "a mapping"))
    return " or ".join(parts)


def checked(name: str, value: Any, hint: Any) -> Any:
    """`value` as the option's type, or a `ValueError`; whole numbers pass as floats."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    for one in _alternatives(hint):
        if get_origin(one) is Literal:
            if value in get_args(one):
                return value
        elif get_origin(one) is Mapping:
            if isinstance(value, Mapping):
                return {str(k): _plain(name, v) for k, v in value.items()}
        elif one in (int, float):
            if number and (one is float or isinstance(value, int)):
                return one(value)
        elif isinstance(value, one):
            return value
    raise ValueError(f"{name} must be {_wanted(hint)}, not {value!r}")


def _plain(name: str, value: Any) -> Any:
    """A value as JSON gives it back: tuples are kept as lists."""
    if isinstance(value, (list, tuple)):
        return [_plain(name, v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _plain(name, v) for k, v in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"{name} holds {value!r}; only numbers, text, lists and none can be kept in a file")


def parsed(name: str, text: str, hint: Any) -> Any:
    """The text of a ``key=value`` change as the option's type, or a `ValueError`."""
    alternatives = _alternatives(hint)
    if type(None) in alternatives and text.lower() == "none":
        return None
    for one in alternatives:
        try:
            if one is bool and text.lower() in ("true", "false"):
                return text.lower() == "true"
            if one in (int, float):
                return one(text)
        except ValueError:
            continue
        if one is str or (get_origin(one) is Literal and text in get_args(one)):
            return text
    raise ValueError(f"{name}={text}: {name} must be {_wanted(hint)}")


def literal(text: str) -> Any:
    """A value as Python would read it, else the text itself.

    ``true``, ``false`` and ``None`` are values; lower-case ``none`` is text, because
    methods have an option of that name (``selection=none``).

    Example:
        >>> [literal(t) for t in ("16", "(1, 2)", "true", "None", "none", "index")]
        [16, (1, 2), True, None, 'none', 'index']
    """
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
