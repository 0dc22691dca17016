"""Weights that a run starts from: `load_weights`.

Shapes: those of the network's own tensors; nothing is reshaped.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import nn

from pliant._config import some
from pliant._state import difference, shapes
from pliant.anatomy import classifier
from pliant.checkpoint import arguments_of, load, read_config
from pliant.models._build import plain_form
from pliant.surgery import conversions, methods_in
from pliant.surgery import convert as converted
from pliant.train.run import network_folder


def load_weights(
    network: nn.Module,
    place: str | os.PathLike[str],
    *,
    classes: tuple[str, ...] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    convert: bool = True,
) -> None:
    """Give a network the weights of a saved one, in place.

    Weights of the plain network start its converted forms too, each as its method starts from a
    trained network: `Method.take_plain` and `Method.why_fresh` tell.

    Files of others may name the classifier otherwise, begin every name with ``module.``, and lack
    the norms' counts of batches.

    Args:
        network: the network that gets the weights.
        place: a folder that `pliant.save` or `pliant.train.fit` wrote, or a file of a state
            dict (``.safetensors``, or of `torch.save`; nothing in it is executed).
        classes: names of the classes of the data; a folder with other names is refused.
        mean: mean of each channel that images will be normalised by; a warning is logged where
            the folder says otherwise.
        std: standard deviation of each channel, as for `mean`.
        convert: take weights of the plain network too, and convert them. Off: the weights have to
            be the network's own.

    Raises:
        ValueError: the weights are neither this network's nor its plain form's; a method would
            start at random all the same (`Method.why_fresh`); the network was converted once more
            since it was named, and the weights are its plain form's; the classes have other names,
            or another order; the file is damaged.
        FileNotFoundError: nothing is there.

    Example:
        >>> import tempfile, timm, pliant
        >>> plain = timm.create_model("resnet20_cifar")
        >>> adaptive = timm.create_model("resnet20_cifar_adn")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     load_weights(adaptive, pliant.save(plain, f"{folder}/net"))
        >>> bool((adaptive.layer1[0].block.bn1.base.weight == plain.layer1[0].bn1.weight).all())
        True
    """
    place = Path(place)
    state = _of_folder(place, classes, mean, std) if place.is_dir() else _of_file(place)
    problem = _fill(network, state)
    if not problem:
        return
    if not convert:
        raise ValueError(
            f"the weights in {place} do not fit {type(network).__name__}: {problem}; it is not to be "
            f"trained, so they have to be its own, not those of its plain form (name that instead)"
        )
    for method in reversed(methods_in(network)):
        if method.take_plain(network, partial(_fill, state=state)):
            return
    if any(done.named for done in conversions(network)):
        name = cast("Mapping[str, str]", network.pretrained_cfg)["architecture"]
        plain, methods = plain_form(name, **arguments_of(network))
        problem = _fill(plain, state)
        if not problem:
            for reason in filter(None, (method.why_fresh() for method in methods)):
                raise ValueError(f"the weights in {place} are of the plain network, and {reason}")
            problem = _fill(network, converted(plain, *methods, inplace=True).state_dict())
            if not problem:
                return
            problem = f"{problem} ({name} was converted once more: load its weights before that)"
        else:
            problem = f"{problem} (compared with its plain form)"
    raise ValueError(f"the weights in {place} do not fit {type(network).__name__}: {problem}")


def _fill(network: nn.Module, state: Mapping[str, Any]) -> str:
    """Load a state dict that is the network's but for names; else return how it differs."""
    state, own = dict(state), network.state_dict()
    left, lacking = state.keys() - own.keys(), own.keys() - state.keys()
    # As torch itself does with files from before it counted.
    state |= {k: own[k].new_zeros(()) for k in lacking if k.endswith("num_batches_tracked")}
    if (path := classifier(network)) is not None:
        ours = {f"{path}.{part}" for part in ("weight", "bias")} & own.keys()
        heads = {name.rpartition(".")[0] for name in left}
        if ours <= lacking and len(heads) == 1 and len(left) == len(ours):
            state |= {f"{path}.{name.rpartition('.')[2]}": state.pop(name) for name in left}
    problem = difference(shapes(state), shapes(own))
    if not problem:
        network.load_state_dict(state)
    return problem


def _of_folder(
    folder: Path,
    classes: tuple[str, ...] | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
) -> Mapping[str, Any]:
    folder = network_folder(folder)
    config = read_config(folder)
    if classes and config.classes and config.classes != classes:
        raise ValueError(
            f"the weights in {folder} are for the classes {some(config.classes)}; the data's are "
            f"{some(classes)}"
        )
    for name, ours, theirs in (("mean", mean, config.mean), ("std", std, config.std)):
        if ours and theirs and any(abs(a - b) > 1e-4 for a, b in zip(ours, theirs, strict=False)):
            logging.getLogger(__name__).warning(
                "the weights in %s know images of another %s: %s; this run's is %s (see mean_std)",
                folder, name, theirs, ours,
            )  # fmt: skip
    return load(folder).state_dict()


def _of_file(path: Path) -> Mapping[str, Any]:
    from timm.models import load_state_dict

    if not path.is_file():
        raise FileNotFoundError(f"{path} is no folder and no file of weights")
    try:
        state: Mapping[str, Any] = load_state_dict(str(path), use_ema=False)
    except Exception as error:  # torch and safetensors raise many kinds for a damaged file
        raise ValueError(f"{path} is no file of weights: {error}") from error
    return state
