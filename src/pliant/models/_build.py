"""Register networks with timm: a timm base network, plus surgery.

timm takes any callable as ``model_cls``, so one path serves ``create_model``,
``list_models``, ``in_chans``, ``num_classes``, ``features_only``, ``output_stride``
and the loading of weights alike.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import FeatureDictNet, build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from pliant.surgery import Method, convert, inherit_conversions, mark_named

Builder = Callable[..., nn.Module]

# Of each registered name: a function of its keyword arguments that gives the plain network and
# the methods that convert it.
_PARTS: dict[str, Callable[..., tuple[nn.Module, tuple[Method, ...]]]] = {}


def register(
    module: str,
    name: str,
    build: Builder,
    *,
    methods: tuple[type[Method], ...] = (),
    input_size: tuple[int, int, int] = (3, 224, 224),
    num_classes: int = 1000,
    feature_levels: int | tuple[int, ...] = 5,
    flatten: bool = False,
    feature_class: str | None = None,
    config: Mapping[str, str] | None = None,
    **method_defaults: Any,
) -> None:
    """Register one network with timm, under a name that must be free.

    Args:
        module: ``__name__`` of the file that registers.
        name: the network's name.
        build: gives the plain network for timm's keyword arguments.
        methods: convert the network, in this order; keyword arguments of ``create_model``
            that are a method's options go to it, all others to `build`.
        input_size: channels, height, width the network is made for.
        num_classes: classes by default.
        feature_levels: how many feature maps ``features_only`` gives by default, or which.
        flatten: the stages lie in one ``Sequential`` of the network.
        feature_class: timm's way to ``features_only``; None: by the modules of the stages.
            ``"getter"`` for networks that give their features themselves (ViT).
        config: what else timm's configuration says (names of first and last layer).
        method_defaults: options of the methods for this name.

    Raises:
        ValueError: timm knows the name already (it would only warn, and overwrite).
    """
    if timm.is_model(name):
        raise ValueError(f"timm already has a model named {name!r}; choose another name")
    indices = tuple(range(feature_levels)) if isinstance(feature_levels, int) else feature_levels
    # Options that are gone too, so that the method reads or refuses them, and not the network.
    options = [
        (method, {*inspect.signature(method).parameters, *(old.name for old in method.gone)})
        for method in methods
    ]

    def parts(**kwargs: Any) -> tuple[nn.Module, tuple[Method, ...]]:
        told = method_defaults | kwargs
        chosen = tuple(
            method(**method.current_options({k: told[k] for k in names & told.keys()}))
            for method, names in options
        )
        theirs = {k for _, names in options for k in names}
        return build(**{k: v for k, v in kwargs.items() if k not in theirs}), chosen

    def network(**kwargs: Any) -> nn.Module:
        model, chosen = parts(**kwargs)
        if chosen:
            convert(model, *chosen, inplace=True)
            mark_named(model)
        return model

    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        kwargs.setdefault("num_classes", num_classes)
        levels: dict[str, Any] = {"out_indices": indices, "flatten_sequential": flatten}
        if feature_class is not None:
            levels["feature_cls"] = feature_class
        arguments = dict(kwargs)
        built: list[nn.Module] = []

        def keep(**kwargs: Any) -> nn.Module:
            built.append(network(**kwargs))
            return built[0]

        model: nn.Module = build_model_with_cfg(keep, name, pretrained, feature_cfg=levels, **kwargs)
        if isinstance(model, FeatureDictNet):  # it took the stages over, not the record
            inherit_conversions(model, built[0])
        vars(model)["_model_args"] = arguments  # timm records them itself since 1.0.31
        return model

    entry.__name__ = entry.__qualname__ = name
    entry.__module__ = module
    entry.__doc__ = f"{name}: see `{module}`."
    home = sys.modules[module]
    settings = {
        "num_classes": num_classes,
        "input_size": input_size,
        "pool_size": None,
        "crop_pct": 0.875 if input_size[1] >= 64 else 1.0,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        **(config or {}),
    }
    home.__dict__.setdefault("default_cfgs", {}).update(generate_default_cfgs({name: settings}))
    setattr(home, name, entry)
    register_model(entry)
    _PARTS[name] = parts


def list_networks() -> list[str]:
    """Names of all networks that pliant registers with timm, sorted.

    Example:
        >>> "resnet50_mod" in list_networks()
        True
    """
    return sorted(_PARTS)


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
    if name not in _PARTS:
        return timm.create_model(name, **arguments), ()
    return _PARTS[name](**arguments)
