"""Weights that a run starts from: `load_weights`.

Shapes: those of the network's own tensors; nothing is reshaped.
"""

from __future__ import annotations

import argparse
import logging
import os
import pickle
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor, nn

from pliant._config import some
from pliant._state import difference, shapes
from pliant.anatomy import classifier
from pliant.checkpoint import arguments_of, load, read_config
from pliant.models._build import plain_form
from pliant.surgery import conversions, methods_in
from pliant.surgery import convert as converted
from pliant.train.run import network_folder
from pliant.train.saved import OURS

# The keys of a training script's file, in the order in which timm looks for weights.
_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")
_log = logging.getLogger(__name__)


def load_weights(
    network: nn.Module,
    place: str | os.PathLike[str],
    *,
    classes: tuple[str, ...] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    convert: bool = True,
    new_classifier: bool = True,
) -> None:
    """Give a network the weights of a saved one, in place.

    Weights of the plain network start its converted forms too, each as its method starts from a
    trained network: `Method.take_plain` and `Method.why_fresh` tell.

    Files of others may name the classifier otherwise, begin every name with ``module.`` or
    ``model.`` (as Lightning's do), and lack the norms' counts of batches. Of several networks in a
    file the one is taken that timm takes, the average before the last; of a run's ``last.ckpt`` the
    best epoch's. A warning is logged then.

    Args:
        network: the network that gets the weights.
        place: a folder that `pliant.save` or `pliant.train.fit` wrote, or a file of a state
            dict (``.safetensors``, or of `torch.save`; nothing in it is executed), also within the
            checkpoint of a training script, of Lightning or of `pliant.train.fit`.
        classes: names of the classes of the data; a folder with as many others is refused.
        mean: mean of each channel that images will be normalised by; a warning is logged where
            the folder says otherwise.
        std: standard deviation of each channel, as for `mean`.
        convert: take weights of the plain network too, and convert them. Off: the weights have to
            be the network's own.
        new_classifier: leave the network's classifier as it is where the weights have another number
            of classes, or no classifier; a warning is logged. Off: such weights are refused.

    Raises:
        ValueError: the weights are neither this network's nor its plain form's; a method would
            start at random all the same (`Method.why_fresh`); the network was converted once more
            since it was named, and the weights are its plain form's; the classes have other names,
            or another order; the file is damaged, or holds more than data.
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
    if place.is_dir():
        state = _of_folder(place, classes, mean, std, new_classifier)
    else:
        state = _network_in(_of_file(place), network, place)
    fill = partial(_fill, state=state, new_classifier=new_classifier)
    problem = fill(network)
    if not problem:
        return
    if not convert:
        raise ValueError(
            f"the weights in {place} do not fit {type(network).__name__}: {problem}; it is not to be "
            f"trained, so they have to be its own, not those of its plain form (name that instead)"
        )
    for method in reversed(methods_in(network)):
        if method.take_plain(network, fill):
            return
    if any(done.named for done in conversions(network)):
        name = cast("Mapping[str, str]", network.pretrained_cfg)["architecture"]
        plain, methods = plain_form(name, **arguments_of(network))
        problem = fill(plain)
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


def _fill(network: nn.Module, state: Mapping[str, Any], new_classifier: bool = False) -> str:
    """Load a state dict that is the network's but for names and classes; else return how it differs."""
    state, own = dict(state), network.state_dict()
    left, lacking = state.keys() - own.keys(), own.keys() - state.keys()
    # As torch itself does with files from before it counted.
    state |= {k: own[k].new_zeros(()) for k in lacking if k.endswith("num_batches_tracked")}
    if (path := classifier(network)) is not None:
        ours = {f"{path}.{part}" for part in ("weight", "bias")} & own.keys()
        heads = {name.rpartition(".")[0] for name in left}
        if ours <= lacking and len(heads) == 1 and len(left) == len(ours):
            state |= {f"{path}.{name.rpartition('.')[2]}": state.pop(name) for name in left}
    fresh = _of_other_classes(network, state, own) if new_classifier else {}
    problem = difference(shapes({**state, **fresh}), shapes(own))
    if not problem:
        network.load_state_dict({**state, **fresh})
        if fresh:
            _log.warning(
                "the weights have another number of classes: the classifier is new (%s)", some(fresh)
            )
    return problem


def _of_other_classes(
    network: nn.Module, state: Mapping[str, Any], own: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Entries of the network's classifier, where a state dict has them for other classes, or none."""
    get = getattr(network, "get_classifier", None)
    found = get() if callable(get) else None  # converted or not
    path = next((p for p, m in network.named_modules() if m is found and p), None) or classifier(network)
    if path is None:
        return {}
    head = network.get_submodule(path)
    classes = getattr(network, "num_classes", None) or getattr(head, "out_features", None)
    ours = {k: v for k, v in own.items() if k.startswith(f"{path}.")}
    theirs = {k: state[k] for k in ours if isinstance(state.get(k), Tensor)}
    if not theirs:
        return ours
    other = [k for k in theirs if theirs[k].shape != ours[k].shape]
    for k in other:
        sides = zip(theirs[k].shape, ours[k].shape, strict=False)
        if theirs[k].dim() != ours[k].dim() or any(a != b != classes for a, b in sides):
            return {}
    return {k: ours[k] for k in other}


def _network_in(state: Mapping[str, Any], network: nn.Module, path: Path) -> Mapping[str, Any]:
    """The entries of the network itself, where all names in a file begin with the name of a wrapper."""
    own = network.state_dict().keys()
    starts: Counter[str] = Counter()
    for name in state:
        parts = name.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in own:
                starts[".".join([*parts[:i], ""])] += 1
    if not starts or "" in starts:
        return state
    start = max(starts, key=lambda s: (starts[s], -len(s)))
    found = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
    if beside := state.keys() - {start + k for k in found}:
        _log.warning("%s: the weights are those of %s; beside them are %s", path, start[:-1], some(beside))
    return found


def _of_folder(
    folder: Path,
    classes: tuple[str, ...] | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    new_classifier: bool,
) -> Mapping[str, Any]:
    folder = network_folder(folder)
    config = read_config(folder)
    same = not (new_classifier and classes) or config.num_classes == len(classes)
    if same and classes and config.classes and config.classes != classes:
        raise ValueError(
            f"the weights in {folder} are for the classes {some(config.classes)}; the data's are "
            f"{some(classes)}; to train other classes, load the network, reset_classifier(0), and save it"
        )
    for name, ours, theirs in (("mean", mean, config.mean), ("std", std, config.std)):
        if ours and theirs and any(abs(a - b) > 1e-4 for a, b in zip(ours, theirs, strict=False)):
            _log.warning(
                "the weights in %s know images of another %s: %s; this run's is %s (see mean_std)",
                folder, name, theirs, ours,
            )  # fmt: skip
    return load(folder).state_dict()


def _of_file(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no folder and no file of weights")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        # Not by timm, some versions of which run what is pickled. Its scripts save their arguments too.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is no file of weights, or holds objects, which are not read because that can run code "
            f"({str(error).partition('. ')[0]}); save its state dict alone, by safetensors or torch.save"
        ) from error
    except Exception as error:  # torch and safetensors raise many kinds for a damaged file
        raise ValueError(f"{path} is no file of weights: {error}") from error
    state = _chosen(content, path) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(k, str) for k in state):
        raise ValueError(f"{path} is no file of weights: it holds a {type(state or content).__name__}")
    return state


def _chosen(content: Mapping[str, Any], path: Path) -> Any:
    """The state dict in a checkpoint, or the checkpoint itself if it is one."""
    ours = content.get(OURS)
    if isinstance(ours, Mapping) and ours.get("best"):
        epoch = ours["best"]["epoch"] + 1
        _log.warning("%s: the weights are those of the best epoch so far, the run's %d.", path, epoch)
        return ours["best"]["weights"]
    found = [key for key in _KEYS if isinstance(content.get(key), Mapping)]
    if len(found) > 1:
        _log.warning("%s holds %s; the weights are %s, as timm takes them", path, some(found), found[0])
    return content[found[0]] if found else content
