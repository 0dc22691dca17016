"""Options in frozen dataclasses: checked against their types, and read from ``key=value`` text.

The types say all that is asked of one option by itself, its range too; pydantic checks them. What several
options ask of one another is checked by their class.
"""

from __future__ import annotations

import ast
import difflib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from typing import Annotated, Any, get_args, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model


def _plain(value: Any) -> Any:
    """A value as JSON gives it back: tuples are kept as lists."""
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"{value!r} cannot be kept in a file; only numbers, text, lists and none can")


def _path(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


Whole = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[str, BeforeValidator(_path)]
Numbers = Annotated[tuple[Whole, ...], Field(strict=False)]  # a list too: JSON knows no other
Arguments = Annotated[Mapping[str, Any], BeforeValidator(_plain)]


@cache
def _hints(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {f.name: hints[f.name] for f in fields(kind)}


@cache
def _model(kind: type) -> type[BaseModel]:
    config = ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=())
    options: dict[str, Any] = {name: (hint, None) for name, hint in _hints(kind).items()}
    return create_model(kind.__name__, __config__=config, **options)


def check(options: Any) -> None:
    """Check each field of a frozen dataclass against its type, in place; whole numbers become floats.

    Args:
        options: an instance, within its ``__post_init__``.

    Raises:
        ValueError: some values are wrong; the message names each option, what it must be, and its value.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Options:
        ...     epochs: Annotated[int, Field(ge=1)] = 10
        ...     clip: Annotated[float, Field(gt=0)] | None = None
        ...
        ...     def __post_init__(self) -> None:
        ...         check(self)
        >>> Options(clip=1)
        Options(epochs=10, clip=1.0)
        >>> Options(epochs=0, clip="1")
        Traceback (most recent call last):
            ...
        ValueError: epochs must be greater than or equal to 1, not 0; clip must be a valid number, or
        none, not '1'
    """
    kind: type = type(options)
    given = {name: getattr(options, name) for name in _hints(kind)}
    for name, value in _valid(kind, _model(kind).model_validate, given).items():
        object.__setattr__(options, name, value)


def parse(kind: type, texts: Mapping[str, str]) -> dict[str, Any]:
    """The values of options that are given as text.

    Args:
        kind: the dataclass.
        texts: text by name of the option; ``none`` (where the option may be None), ``true``, ``0.5``.

    Raises:
        ValueError: as `check`.
    """
    none = {k for k, text in texts.items() if text.lower() == "none" and _optional(kind, k)}
    rest = {k: text for k, text in texts.items() if k not in none}
    return {**dict.fromkeys(none), **_valid(kind, _model(kind).model_validate_strings, rest)}


def refuse_unknown(names: Iterable[str], known: Sequence[str], what: str) -> None:
    """Refuse names of options that there are not.

    Args:
        names: of the options that were given.
        known: names of all options.
        what: what they are options of, as the message begins: ``"a recipe"``.

    Raises:
        ValueError: an unknown name; the message has close ones, else all.

    Example:
        >>> refuse_unknown(["epoch"], ["epochs", "lr"], "a recipe")
        Traceback (most recent call last):
            ...
        ValueError: a recipe has no option 'epoch'; did you mean epochs?
    """
    for name in names:
        if name not in known:
            raise ValueError(f"{what} has no option {name!r}; {suggestion(name, known)}")


def suggestion(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """What to say of a name that is not known: the close ones, else `otherwise`, else all.

    Example:
        >>> suggestion("epoch", ["epochs", "lr"]), suggestion("x", ["epochs", "lr"])
        ('did you mean epochs?', 'known: epochs, lr')
    """
    known = list(known)
    if close := difflib.get_close_matches(name, known, n=3):
        return f"did you mean {', '.join(close)}?"
    return otherwise or f"known: {', '.join(known) or 'none'}"


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


def _valid(kind: type, validate: Callable[[Any], BaseModel], given: Mapping[str, Any]) -> dict[str, Any]:
    try:
        found = validate(given)
        return {name: getattr(found, name) for name in given}
    except ValidationError as error:
        raise ValueError("; ".join(_told(kind, e) for e in error.errors(include_url=False))) from None


def _told(kind: type, error: Any) -> str:
    """One error as a sentence; pydantic says ``Input should be a valid integer, unable to parse ...``."""
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "value_error":
        return f"{name}: {error['ctx']['error']}"
    wanted = error["msg"].partition("should ")[2].partition(", unable")[0]
    wanted = wanted.replace("a valid tuple", "a list")
    return f"{name} must {wanted}{', or none' * _optional(kind, name)}, not {error['input']!r}"


def _optional(kind: type, name: str) -> bool:
    return type(None) in get_args(_hints(kind).get(name))
