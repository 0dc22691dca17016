"""The methods: a folder and a line here each, or a package of its own with an entry point.

A package brings a method by an entry point of the group ``pliant.methods``: its name is the
method's suffix, its value the class. The named networks (``resnet20_cifar_<suffix>``) are known
to timm as soon as pliant is imported; the package itself is imported when somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from importlib.metadata import EntryPoint, entry_points

import timm

from pliant.method import Method
from pliant.methods import combined as combined
from pliant.methods.adaptive_depth import AdaptiveDepth, Subnet
from pliant.methods.condconv import CondConv
from pliant.methods.mixture_of_depths import MixtureOfDepths
from pliant.models import PLAIN_NETWORKS, list_networks, register
from pliant.models._build import methods_of

GROUP = "pliant.methods"

_OWN: dict[str, type[Method]] = {
    cls.__name__: cls
    for cls in (
        MixtureOfDepths,
        CondConv,
        AdaptiveDepth,
        Subnet,
    )
}


class _Methods(Mapping[str, type[Method]]):
    """All methods by the name of their class: pliant's at once, others when they are asked for."""

    def __getitem__(self, name: str) -> type[Method]:
        return _OWN[name] if name in _OWN else _others()[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**_OWN, **_others()})

    def __len__(self) -> int:
        return len(_OWN) + len(_others())


METHODS: Mapping[str, type[Method]] = _Methods()


@cache
def _others() -> dict[str, type[Method]]:
    """The methods of other packages, by the name of their class.

    Raises:
        ImportError: a package cannot be imported.
        ValueError: what its entry point names is no method, or bears a name that is taken.
    """
    found: dict[str, type[Method]] = {}
    taken = {name: "pliant" for cls in _OWN.values() for name in (cls.suffix, *cls.comparisons())}
    for point in entry_points(group=GROUP):
        cls, where = _loaded(point), _of(point)
        if point.name in taken:
            raise ValueError(
                f"{where} brings a method of the suffix {point.name!r}, which {taken[point.name]} has; "
                f"uninstall one of the two"
            )
        if cls.__name__ in {**_OWN, **found}:
            raise ValueError(
                f"{where} brings a second method named {cls.__name__}; rename the class, or uninstall it"
            )
        found[cls.__name__] = cls
        taken |= dict.fromkeys((point.name, *cls.comparisons()), where)
    return found


def _loaded(point: EntryPoint) -> type[Method]:
    """The class that an entry point names."""
    try:
        cls = point.load()
    except Exception as error:  # whatever the import of somebody's package raises
        raise ImportError(f"{_of(point)} cannot be loaded: {error}; mend or uninstall it") from error
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise ValueError(f"{_of(point)} is {cls!r}; it has to name a subclass of pliant.Method")
    if cls.suffix != point.name or not point.name.isidentifier():
        raise ValueError(
            f"{_of(point)}: the entry point's name {point.name!r} and the suffix {cls.suffix!r} of "
            f"{cls.__name__} have to be one word, the same"
        )
    return cls


def _of(point: EntryPoint) -> str:
    """An entry point and its package, for messages."""
    package = f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown package"
    return f"{point.value!r} of {package}"


def _name_networks(name_of: Callable[[str], str], methods: Callable[[], tuple[type[Method], ...]]) -> None:
    """Register the form of each plain network, for a method that has no named networks of its own."""
    for base, plain in PLAIN_NETWORKS.items():
        name = name_of(base)
        # A name that is taken is an error when the method is loaded, not whenever pliant is imported.
        if name.isidentifier() and not timm.is_model(name):
            register(__name__, name, plain, base=base, methods=methods)


def _loaded_by(suffix: str) -> tuple[type[Method], ...]:
    return tuple(cls for cls in _others().values() if cls.suffix == suffix)


_NAMED = {cls for name in list_networks() for cls in methods_of(name)}
for _cls in _OWN.values():
    if _cls.suffix and _cls not in _NAMED:
        _name_networks(_cls.network_name, partial(tuple, (_cls,)))
for _suffix in dict.fromkeys(point.name for point in entry_points(group=GROUP)):
    _name_networks(f"{{}}_{_suffix}".format, partial(_loaded_by, _suffix))
