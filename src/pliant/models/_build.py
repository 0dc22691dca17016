"""Register networks with timm: a plain network, plus surgery.

timm takes any callable as ``model_cls``, so one path serves ``create_model``,
``list_models``, ``in_chans``, ``num_classes``, ``features_only``, ``output_stride``
and the loading of weights alike.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import FeatureDictNet, build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from pliant._config import is_foreign
from pliant._options import suggestion
from pliant.method import Method
from pliant.surgery import carry_out, inherit_conversions, mark_named


@dataclass(frozen=True, kw_only=True)
class PlainNetwork:
    """A plain network, and what timm is told of it and of its converted forms.

    Attributes:
        build: gives the network for timm's keyword arguments.
        input_size: channels, height, width that it is made for.
        num_classes: classes by default.
        reduction: pixels of the image for one of the last feature map; None for a transformer.
        feature_levels: how many feature maps ``features_only`` gives by default, or which.
        flatten: the stages lie in one ``Sequential`` of the network.
        feature_class: timm's way to ``features_only``; None: by the modules of the stages.
            ``"getter"`` for networks that give their features themselves (ViT).
        config: what else timm's configuration says (names of first and last layer, a fixed size).
        narrow: the first stage has 16 channels (`Method.narrow`).
    """

    build: Callable[..., nn.Module]
    input_size: tuple[int, int, int] = (3, 224, 224)
    num_classes: int = 1000
    reduction: int | None = 32
    feature_levels: int | tuple[int, ...] = 5
    flatten: bool = False
    feature_class: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    narrow: bool = False


@dataclass(frozen=True)
class _Network:
    """A registered name: its plain network, its methods (loaded on use), and their options."""

    base: str
    plain: PlainNetwork
    methods: Callable[[], tuple[type[Method], ...]]
    options: Mapping[str, Any]

    def parts(self, **kwargs: Any) -> tuple[nn.Module, tuple[Method, ...]]:
        """The plain network for arguments of ``create_model``, and the methods that convert it."""
        chosen, theirs = [], set()
        for method in self.methods():
            # Options that are gone too, so that the method reads or refuses them, and not the network.
            names = {*inspect.signature(method).parameters, *(old.name for old in method.gone)}
            told = {
                **method.named,
                **(method.narrow if self.plain.narrow else {}),
                **self.options,
                **kwargs,
            }
            chosen.append(method(**method.current_options({k: told[k] for k in names & told.keys()})))
            theirs |= names
        return self.plain.build(**{k: v for k, v in kwargs.items() if k not in theirs}), tuple(chosen)

    def build(self, **kwargs: Any) -> nn.Module:
        """The converted network for arguments of ``create_model``."""
        model, methods = self.parts(**kwargs)
        if methods:
            for method in methods:  # the network is nobody's yet: no rehearsal
                carry_out(model, method)
            mark_named(model)
        return model


_NETWORKS: dict[str, _Network] = {}


def register(
    module: str,
    name: str,
    plain: PlainNetwork,
    *,
    base: str = "",
    methods: Iterable[type[Method]] | Callable[[], tuple[type[Method], ...]] = (),
    **options: Any,
) -> None:
    """Register one network with timm, under a name that must be free.

    Args:
        module: ``__name__`` of the file that registers.
        name: the network's name.
        plain: the plain network.
        base: name of the plain network; empty: `name` itself.
        methods: convert the network, in this order; keyword arguments of ``create_model``
            that are a method's options go to it, all others to ``plain.build``. A function
            that returns them is called when a network is built.
        options: options of the methods for this name, before `Method.named`.

    Raises:
        ValueError: timm knows the name already (it would only warn, and overwrite).
    """
    if timm.is_model(name):
        raise ValueError(f"timm already has a model named {name!r}; choose another name")
    loaded = methods if callable(methods) else partial(tuple, tuple(methods))
    maps = plain.feature_levels
    features: dict[str, Any] = {
        "out_indices": tuple(range(maps)) if isinstance(maps, int) else maps,
        "flatten_sequential": plain.flatten,
    }
    if plain.feature_class is not None:
        features["feature_cls"] = plain.feature_class

    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        kwargs.setdefault("num_classes", plain.num_classes)
        # timm passes on where a network's weights are from, too: no argument of the network.
        arguments = {k: v for k, v in kwargs.items() if not is_foreign(k)}
        built: list[nn.Module] = []

        def keep(**kwargs: Any) -> nn.Module:
            built.append(_NETWORKS[name].build(**kwargs))
            return built[0]

        model: nn.Module = build_model_with_cfg(
            keep, name, pretrained, feature_cfg=dict(features), **kwargs
        )
        if isinstance(model, FeatureDictNet):  # it took the stages over, not the record
            inherit_conversions(model, built[0])
        vars(model)["_model_args"] = arguments  # timm records them itself since 1.0.31
        return model

    entry.__name__ = entry.__qualname__ = name
    entry.__module__ = module
    entry.__doc__ = f"{name}: see `{module}`."
    home = sys.modules[module]
    settings = {
        "num_classes": plain.num_classes,
        "input_size": plain.input_size,
        "pool_size": plain.reduction and tuple(side // plain.reduction for side in plain.input_size[1:]),
        "crop_pct": 0.875 if plain.input_size[1] >= 64 else 1.0,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        **plain.config,
    }
    home.__dict__.setdefault("default_cfgs", {}).update(generate_default_cfgs({name: settings}))
    setattr(home, name, entry)
    register_model(entry)
    _NETWORKS[name] = _Network(base or name, plain, loaded, options)


def list_networks() -> list[str]:
    """Names of all networks that pliant registers with timm, sorted.

    Example:
        >>> "resnet50_mod" in list_networks()
        True
    """
    return sorted(_NETWORKS)


def plain_form(name: str, **arguments: Any) -> tuple[nn.Module, tuple[Method, ...]]:
    """A named network before its methods converted it, and these methods.

    Args:
        name: a network that timm knows; of one that pliant did not register there are no
            methods, and the network is timm's.
        arguments: as for ``timm.create_model``; the options of the methods go to these.

    Returns:
        The plain network with fresh weights, and the methods in the order of their use:
        ``convert(network, *methods)`` has the structure of ``timm.create_model(name, ...)``.

    Raises:
        ValueError: a method does not take an option's value.
        TypeError: the network does not take an argument.

    Example:
        >>> network, methods = plain_form("resnet20_cifar_mod_adn", c=8, num_classes=5)
        >>> network.num_classes, [method.name for method in methods], methods[0].c
        (5, ['MixtureOfDepths', 'AdaptiveDepth'], 8)
    """
    if name not in _NETWORKS:
        return timm.create_model(name, **arguments), ()
    return _NETWORKS[name].parts(**arguments)


def methods_of(name: str) -> tuple[type[Method], ...]:
    """The methods of a named network, in the order of their use; none of a network that is not ours.

    Example:
        >>> [method.__name__ for method in methods_of("resnet20_cifar_mod_adn")], methods_of("resnet50")
        (['MixtureOfDepths', 'AdaptiveDepth'], ())
    """
    return _NETWORKS[name].methods() if name in _NETWORKS else ()


def base_of(name: str) -> str:
    """Name of the plain network behind a named one; of a network that is not ours the name itself.

    Example:
        >>> [base_of(name) for name in ("cc_mobilenetv1_025", "resnet50_mod", "regnetx_002")]
        ['mobilenetv1_w025', 'resnet50', 'regnetx_002']
    """
    return _NETWORKS[name].base if name in _NETWORKS else name


def check_network(name: str, also: str = "") -> None:
    """Refuse a name that timm does not know; `also` says what else it is not.

    Raises:
        ValueError: the close names are listed.
    """
    if not timm.is_model(name):
        hint = suggestion(name, timm.list_models(), "timm.list_models() lists the networks")
        raise ValueError(f"timm has no network {name!r}{also}; {hint}")


def create(name: str, device: str = "cpu", **arguments: Any) -> nn.Module:
    """A network of timm on a device; on ``meta`` it takes no memory.

    Args:
        name: timm's name of it.
        device: where its parameters lie.
        arguments: of `timm.create_model`.
    """
    try:
        with torch.device(device):
            return cast("nn.Module", timm.create_model(name, **arguments))
    except NotImplementedError:  # the RegNets of older timms compute their widths by tensors
        if device != "meta":
            raise
    with torch.device("cpu"):
        return cast("nn.Module", timm.create_model(name, **arguments).to(device))
