"""Weights that a run starts from: `load_weights`.

Shapes: those of the network's own tensors; nothing is reshaped.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from pliant._state import difference, shapes
from pliant.checkpoint import load, read_config
from pliant.depth import get_depth, subnet
from pliant.methods.adaptive_depth import SwitchableNorm
from pliant.switch import Depth
from pliant.train.run import BEST


def load_weights(
    network: nn.Module,
    place: str | os.PathLike[str],
    *,
    classes: tuple[str, ...] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> None:
    """Give a network the weights of a saved one, in place.

    Weights of a plain network start an adaptive one too: both norms of a pair get those of
    the one norm there is, so that the whole network gives what the plain one gave.

    Args:
        network: what gets them.
        place: a folder that `pliant.save` or `pliant.train.fit` wrote, or a file of a state
            dict (``.safetensors``, or of `torch.save`; nothing in it is executed).
        classes: of the data that comes; a folder that names others is refused.
        mean: by which images will be normalised; where the folder says otherwise, a
            warning is logged.
        std: likewise.

    Raises:
        ValueError: the weights are not this network's, nor its plain form's; the names of the
            classes are others, or in another order; or the file is damaged.
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
    found = shapes(state)
    problem = difference(found, shapes(network.state_dict()))
    if not problem:
        network.load_state_dict(state)
        return
    if any(isinstance(m, Depth) for m in network.modules()):
        # On the same tensors, under the names that they have without the method.
        plain = subnet(network, (False,) * len(get_depth(network)), share=True)
        if not difference(found, shapes(plain.state_dict())):
            plain.load_state_dict(state)
            for module in network.modules():
                if isinstance(module, SwitchableNorm):
                    module.base.load_state_dict(module.full.state_dict())
            return
    raise ValueError(f"the weights in {place} do not fit {type(network).__name__}: {problem}")


def _of_folder(
    folder: Path,
    classes: tuple[str, ...] | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
) -> Mapping[str, Any]:
    folder = folder / BEST if (folder / BEST).is_dir() else folder
    config = read_config(folder)
    if classes and config.classes and config.classes != classes:
        raise ValueError(
            f"the weights in {folder} are for the classes {_few(config.classes)}; the data's are "
            f"{_few(classes)}"
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


def _few(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:4])}{', ...' * (len(names) > 4)} ({len(names)})"
