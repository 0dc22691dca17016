"""What a checkpoint says of its network: `Config`, and the rules for what it may say.

Everything here comes from, or goes to, a file that anybody may have written: plain
values only, and of ``timm.create_model``'s arguments only those that build.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from hashlib import sha256
from typing import Any

import timm
from pydantic import InstanceOf

from pliant._options import Count, Positive, Whole, check
from pliant._version import __version__
from pliant.method import Method

FORMAT = "pliant"
FORMAT_VERSION = 2  # 1: no `pretrained_cfg`, no checksum, flags of a depth in `state`
_CHECKSUM = "config_sha256"

# Arguments of `timm.create_model` that fetch or read files, or that say where and how a
# network runs rather than what it is.
_NOT_OURS = {"checkpoint_path", "cache_dir", "scriptable", "exportable", "no_jit", "device", "dtype"}
_NOT_OURS |= {"model_cfg", "kwargs_filter"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """What ``config.json`` says.

    Attributes:
        network: timm's name of the base network.
        arguments: keyword arguments of ``timm.create_model``.
        methods: applied to the base network in this order; those that belong to its
            name are not repeated.
        num_classes: outputs of the classifier; None for a network without one.
        classes: their names, if known.
        input_size: channels, height, width of an image, if known.
        mean: of each channel, subtracted from images in [0, 1], if known.
        std: of each channel, by which they are then divided, if known.
        interpolation: how images are resized, ``"bicubic"``, if known.
        crop_pct: share of the resized image's side that is kept, if known.
        crop_mode: which part is kept, ``"center"``, if known.
        pretrained_cfg: what else timm says of the weights and their images: tag, licence, source, size of
            test images. None in folders of the first format: what timm says of the network's name.
        channels_last: the weights lie in memory that way.
        state: what modules keep beside tensors (their ``get_extra_state``).
        sha256: of ``model.safetensors``.
        versions: of pliant, torch and timm, which wrote the folder.
    """

    network: str
    arguments: Mapping[str, Any]
    methods: tuple[InstanceOf[Method], ...] = ()
    num_classes: Whole | None = None
    classes: tuple[str, ...] | None = None
    input_size: tuple[Count, Count, Count] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[Positive, ...] | None = None
    interpolation: str | None = None
    crop_pct: Positive | None = None
    crop_mode: str | None = None
    pretrained_cfg: Mapping[str, Any] | None = None
    channels_last: bool = False
    state: Mapping[str, Any]
    sha256: str = ""
    versions: Mapping[str, str]

    def __post_init__(self) -> None:
        size = self.input_size
        if isinstance(size, tuple) and len(size) != 3:
            raise ValueError(f"input_size must be channels, height and width, not {size!r}")
        check(self)
        _check_network(self.network)
        check_arguments(self.arguments)
        plain(self.state, "state")
        plain(self.pretrained_cfg, "pretrained_cfg")
        if self.classes is not None and len(self.classes) != self.num_classes:
            raise ValueError(
                f"classes must be {self.num_classes} names, one for each class, not {self.classes!r}"
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and size is not None and len(values) not in (1, size[0]):
                raise ValueError(
                    f"{name} must be one number for each of {size[0]} channels, not {values!r}"
                )

    def to_json(self) -> dict[str, Any]:
        """The content of ``config.json``, as `json.dump` takes it."""
        content = {f.name: getattr(self, f.name) for f in fields(self)}
        content["methods"] = [{"name": m.name, "options": _options(m)} for m in self.methods]
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **content}
        return {**content, _CHECKSUM: checksum(content)}

    @classmethod
    def from_json(cls, content: Any, known: Mapping[str, type[Method]]) -> Config:
        """Read what `to_json` gave, trusting none of it.

        Args:
            content: of the file.
            known: the methods that it may name.

        Raises:
            ValueError: it is not that, or of a newer version, or was changed since, or names an
                unknown network, method or option.
        """
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f'it was not written by pliant (no "format": "{FORMAT}")')
        version = content.get("format_version")
        if type(version) is not int or version < 1:
            raise ValueError(f"format_version must be a whole number from 1, not {version!r}")
        if version > FORMAT_VERSION:
            raise ValueError(
                f"its format version is {version}, and pliant {__version__} knows versions up to "
                f"{FORMAT_VERSION}; upgrade pliant (pip install --upgrade pliant)"
            )
        since = () if version > 1 else ("pretrained_cfg", _CHECKSUM)
        names = [f.name for f in fields(cls)]
        missing = [name for name in (*names, _CHECKSUM) if name not in content and name not in since]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}")
        if (found := checksum(content)) != content.get(_CHECKSUM, found):
            raise ValueError(
                f"it was changed after it was saved: its SHA-256 is {found}, and it says "
                f"{content[_CHECKSUM]!r}; restore the file, or load an unchanged copy and save that with "
                f"other values"
            )
        values = {name: plain(content[name], name) for name in names if name in content}
        if not isinstance(values["methods"], tuple):
            raise ValueError(f"methods must be a list, not {values['methods']!r}")
        values["methods"] = tuple(_method(entry, known) for entry in values["methods"])
        return cls(**values)


def parse(text: str | bytes) -> Any:
    """The content of a JSON file that anybody may have written.

    Raises:
        ValueError: it is no JSON; an object has a key twice; a whole number has more than 64 bits.

    Example:
        >>> parse('{"a": 1, "a": 2}')
        Traceback (most recent call last):
            ...
        ValueError: the key 'a' stands twice
    """
    return json.loads(text, object_pairs_hook=_object, parse_int=_whole)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands twice")
        found[key] = value
    return found


def _whole(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise ValueError(f"the number {digits[:20]}... has {len(digits)} digits, more than 64 bits hold")
    return int(digits)


def checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 of the content of a ``config.json``, its own checksum apart: of the values, in any layout."""
    rest = {k: v for k, v in content.items() if k != _CHECKSUM}
    return sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _method(entry: Any, methods: Mapping[str, type[Method]]) -> Method:
    """A method from its name and options, which the dataclass checks."""
    shaped = isinstance(entry, dict) and entry.keys() == {"name", "options"}
    if not shaped or not isinstance(entry["options"], dict):
        raise ValueError(f"a method must have a name and options, not {entry!r}")
    name, options = entry["name"], entry["options"]
    if not isinstance(name, str) or name not in methods:
        raise ValueError(
            f"unknown method {name!r} (known: {', '.join(methods)}); install the package that brings it, "
            f"or a newer pliant"
        )
    method: Any = methods[name]
    options = method.current_options(options)
    known = [f.name for f in fields(method) if f.init]
    if strange := options.keys() - set(known):
        raise ValueError(
            f"unknown option {some(strange)} of {name} (known: {', '.join(known)}); a newer pliant may "
            f"have it"
        )
    try:
        made: Method = method(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
    return made


def _options(method: Any) -> dict[str, Any]:
    return {f.name: plain(getattr(method, f.name), f.name) for f in fields(method) if f.init}


def _check_network(name: Any) -> None:
    """Only timm's registered names: never a tag, a path or an address to fetch from."""
    # timm itself takes "hf-hub:owner/name" and "local-dir:path", and a tag after a dot.
    if not (isinstance(name, str) and name.isidentifier() and timm.is_model(name)):
        raise ValueError(
            f"unknown network {name!r}: it is not registered with timm {timm.__version__} or pliant "
            f"{__version__}; upgrade them, or import the package that registers it"
        )


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that could load something, or that JSON cannot hold."""
    for name, value in arguments.items():
        if not name.isidentifier() or is_foreign(name):
            raise ValueError(
                f"the argument {name!r} does not belong in a checkpoint: it can load files, or run code"
            )
        plain(value, name)


def is_foreign(name: str) -> bool:
    """Whether `name` is an argument that says something else than what is built."""
    return name in _NOT_OURS or name.startswith("pretrained")


def plain(value: Any, name: str) -> Any:
    """Return `value` if JSON can hold it, lists as tuples; an error that names `name` if not."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(plain(v, name) for v in value)
    if isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
        return {k: plain(v, k) for k, v in value.items()}
    if callable(value):
        raise ValueError(
            f"{name}={value!r} is code, which a checkpoint does not hold; give the network a name that "
            f'timm knows, such as act_layer="silu", or pass arguments={{"{name}": ...}} with it'
        )
    raise ValueError(
        f"{name}={value!r} is neither a finite number nor text, None, or a list or dict of these"
    )


def sequence(name: str, values: Any) -> Any:
    """A tuple of plain values from any sequence: a list, an array, a tensor."""
    if values is None:
        return None
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a sequence, not {values!r}")
    return plain(tuple(values), name)


def some(names: Iterable[str], limit: int = 5) -> str:
    """The first few names, and how many more there are; those of a set are sorted."""
    names = sorted(names) if isinstance(names, set) else list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
