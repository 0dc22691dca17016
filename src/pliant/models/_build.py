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


def register(
    module: str,
    name: str,
    build: Builder,
    *,
    method: type[Method] | None = None,
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
        method: converts the network; keyword arguments of ``create_model`` that are
            its options go to it, all others to `build`.
        input_size: channels, height, width the network is made for.
        num_classes: classes by default.
        feature_levels: how many feature maps ``features_only`` gives by default, or which.
        flatten: the stages lie in one ``Sequential`` of the network.
        feature_class: timm's way to ``features_only``; None: by the modules of the stages.
            ``"getter"`` for networks that give their features themselves (ViT).
        config: what else timm's configuration says (names of first and last layer).
        method_defaults: options of the method for this name.

    Raises:
        ValueError: timm knows the name already (it would only warn, and overwrite).
    """
    if timm.is_model(name):
        raise ValueError(f"timm already has a model named {name!r}; choose another name")
    indices = tuple(range(feature_levels)) if isinstance(feature_levels, int) else feature_levels
    options = set(inspect.signature(method).parameters) if method else set()

    def network(**kwargs: Any) -> nn.Module:
        chosen = method_defaults | {k: kwargs.pop(k) for k in options & kwargs.keys()}
        model = build(**kwargs)
        if method is not None:
            convert(model, method(**chosen), inplace=True)
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
