"""Save a network to a folder and load it again, without pickle: `save`, `load`.

A checkpoint is a folder of two files. ``config.json`` says how the network is built:
its timm name and arguments, the methods that converted it, its classes and the images
it expects. ``model.safetensors`` holds every parameter and buffer. Both are data:
reading them imports, evaluates and downloads nothing. Loading runs the constructors of
networks and methods that are registered already, with plain values, and nothing else.
"""

from __future__ import annotations

import contextvars
import copy
import json
import os
import shutil
import stat
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors.torch import save_file
from timm.utils import unwrap_model
from torch import Tensor, nn

from pliant import outside
from pliant._bounds import Limit, check_size
from pliant._config import FORMAT, Config, check_arguments, is_foreign, parse, plain, sequence, some
from pliant._files import leftovers, replace_folder, scratch_folder, sync
from pliant._state import difference, shapes, ties
from pliant._version import __version__
from pliant.evaluating import evaluating
from pliant.methods import METHODS
from pliant.models._build import create
from pliant.surgery import conversions, convert

__all__ = ["CheckpointError", "Config", "load", "read_config", "save"]

CONFIG = "config.json"
WEIGHTS = "model.safetensors"

_ADVICE = (
    "pass the keyword arguments it was made with as arguments={...}; a network that was changed by "
    "hand cannot be rebuilt from its name"
)


# Fields of `Config` that are parts of timm's ``pretrained_cfg``, and parts that are kept nowhere: names of
# classes are in `Config.classes`, weights in the file.
_TOLD = ("num_classes", "input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
_LEFT = ("architecture", "label_names", "state_dict")


class CheckpointError(ValueError):
    """A folder that `load` cannot turn into a network; the message says why."""


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    arguments: Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_size: tuple[int, int, int] | None = None,
    verify: bool = True,
) -> Path:
    """Write a network to a folder, from which `load` rebuilds it bit by bit.

    The folder appears complete or not at all: it is written under another name beside
    its place and renamed. A checkpoint that was there before is replaced then, and is
    still whole when anything fails. Who loads it meanwhile gets the one or the other.

    Args:
        model: a timm network, plain or converted by pliant, on any device, in any
            dtype. Compiled and data-parallel wrappers are taken off.
        folder: where to; may be an older checkpoint. Parents are made.
        arguments: keyword arguments of ``timm.create_model`` that the network was made
            with. timm 1.0.31 and newer records them, and these then only add to or
            change them (None drops one); older versions do not.
        classes: names of the classes.
        mean: of each channel, subtracted from images in [0, 1]; by default what timm
            says of the network, as for the next two.
        std: of each channel, by which they are then divided.
        input_size: channels, height and width of an image.
        verify: load the folder again before it takes its place, and hold its output
            for one random image against the network's, bit for bit (on the CPU).

    Returns:
        `folder`.

    Raises:
        ValueError: no timm network; an argument that JSON cannot hold; a network that
            was changed in a way that its name, arguments and methods do not tell; a
            `folder` that holds anything but a checkpoint. Nothing is written then.
        OSError: the disk is full, or the folder cannot be written; nothing is left of it.

    Example:
        >>> import tempfile, timm, pliant
        >>> model = timm.create_model("resnet20_cifar_mod", num_classes=3)
        >>> with tempfile.TemporaryDirectory() as place:
        ...     folder = save(model, f"{place}/net", classes=("cat", "dog", "eel"))
        ...     read_config(folder).classes, load(folder).num_classes
        (('cat', 'dog', 'eel'), 3)
    """
    model = unwrap_model(model)
    target = Path(os.path.realpath(folder))
    _check_free(target)
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise ValueError(f"the {type(model).__name__} has no weights to save: it is on the meta device")
    tensors, state = _split_state(model)
    told = {"classes": classes, "mean": mean, "std": std, "input_size": input_size}
    config = _describe(model, arguments, state, **told)
    if verify:
        _check_structure(model, config)
    target.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(target) as temporary:
        try:
            save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:  # what it makes of a full disk
            raise OSError(f"{folder} cannot be written: {error}") from error
        config = replace(config, sha256=sha256((temporary / WEIGHTS).read_bytes()).hexdigest())
        text = json.dumps(config.to_json(), indent=2, allow_nan=False)
        (temporary / CONFIG).write_text(text + "\n", encoding="utf-8")
        shutil.copymode(temporary / CONFIG, temporary / WEIGHTS)  # safetensors makes its file private
        if verify:
            _check_outputs(model, load(temporary), config.input_size)
        for name in (WEIGHTS, CONFIG):
            sync(temporary / name)
        _check_free(target)
        replace_folder(temporary, target)
    return Path(folder)


def load(
    folder: str | os.PathLike[str],
    *,
    num_classes: int | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Rebuild the network that `save` wrote, with the same bits in every tensor.

    Nothing in the folder is executed, and nothing is downloaded. The random
    generators are left as they were.

    Args:
        folder: written by `save`.
        num_classes: how many classes the caller relies on; a network with another
            number is refused.
        device: where the network goes.

    Returns:
        The network, in evaluation mode, in the dtype and memory format it had. Its
        ``pretrained_cfg`` says how its images are prepared, so
        ``timm.data.resolve_model_data_config`` gives the saved normalisation.

    Raises:
        CheckpointError: a ``ValueError``: no such folder; a damaged, truncated or
            foreign file; a newer format; an unknown network, method or option;
            tensors that are not the network's; another number of classes.

    Example:
        >>> import tempfile, timm, pliant
        >>> model = timm.create_model("resnet20_cifar")
        >>> with tempfile.TemporaryDirectory() as place:
        ...     again = load(save(model, f"{place}/net"))
        >>> bool((again.fc.weight == model.fc.weight).all())
        True
    """
    folder = Path(folder)
    files = _version(folder, CONFIG, WEIGHTS)
    config = _config(folder, files)
    if num_classes is not None and num_classes != config.num_classes:
        raise CheckpointError(
            f"the network in {folder} has {config.num_classes or 'no'} classes, not {num_classes}; load it "
            f"without num_classes, then change its head with model.reset_classifier({num_classes})"
        )
    tensors = _tensors(folder, files)
    try:
        check_size(config.arguments, tensors)
        with Limit(tensors):
            bare = _rebuild(config, "meta")  # before it takes memory
    except Exception as error:  # a constructor may raise anything for arguments that do not fit it
        raise CheckpointError(f"{folder / CONFIG}: {config.network} cannot be built: {error}") from error
    problem = difference(shapes({**tensors, **config.state}), shapes(bare.state_dict()))
    if problem:
        raise CheckpointError(f"{folder / WEIGHTS} does not fit {config.network}: {problem}")
    if (digest := sha256(files[WEIGHTS]).hexdigest()) != config.sha256:
        raise CheckpointError(
            f"{folder / WEIGHTS} was changed after it was saved: its SHA-256 is {digest}, "
            f"and {CONFIG} says {config.sha256}"
        )
    if getattr(bare, "num_classes", None) != config.num_classes:
        raise CheckpointError(
            f"{folder / CONFIG}: num_classes is {config.num_classes}, unlike the network's"
        )
    model = _rebuild(config, "cpu")
    _fill(model, tensors, config)
    return model.eval().to(device)


def read_config(folder: str | os.PathLike[str]) -> Config:
    """What the checkpoint in `folder` holds, without reading its weights.

    Raises:
        CheckpointError: as `load`, for all that ``config.json`` can have wrong.

    Example:
        >>> import tempfile, timm, pliant
        >>> with tempfile.TemporaryDirectory() as place:
        ...     folder = save(timm.create_model("resnet20_cifar"), f"{place}/net")
        ...     read_config(folder).input_size
        (3, 32, 32)
    """
    folder = Path(folder)
    return _config(folder, _version(folder, CONFIG))


def _version(folder: Path, *names: str) -> dict[str, bytes]:
    """The contents of files of one version of a folder: `save` may replace it at any moment.

    Raises:
        CheckpointError: there is no such folder, or it is replaced all the time.
    """
    for _ in range(100):
        before, found = _identity(folder), {}
        if before is not None:
            with suppress(FileNotFoundError):
                found = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
            if _identity(folder) == before:
                return found
        elif not (left := leftovers(folder)):
            raise CheckpointError(f"{folder} is no folder")
        time.sleep(0.01)
    if before is None:
        raise CheckpointError(f"{folder} is no folder; an interrupted save left {left[-1].name} beside it")
    raise CheckpointError(f"{folder} is replaced again and again; load it when nobody saves to it")


def _identity(folder: Path) -> tuple[int, ...] | None:
    """What tells one version of a folder from the next; None where there is no folder."""
    try:
        found = folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return (found.st_dev, found.st_ino, found.st_mtime_ns) if stat.S_ISDIR(found.st_mode) else None


def _config(folder: Path, files: Mapping[str, bytes]) -> Config:
    """What ``config.json`` says."""
    if CONFIG not in files:
        raise CheckpointError(f"{folder} is no checkpoint: it has no {CONFIG}")
    try:
        content = parse(files[CONFIG].decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / CONFIG} is damaged: it is no JSON text ({error})") from error
    try:
        return Config.from_json(content, METHODS)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error


def _describe(
    model: nn.Module, arguments: Mapping[str, Any] | None, state: Mapping[str, Any], **told: Any
) -> Config:
    """The configuration of `model`, as far as it, timm and the caller tell."""
    known: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    if not known.get("architecture"):
        raise ValueError(
            f"{type(model).__name__} does not come from timm.create_model (it has no pretrained_cfg with "
            f"an architecture), so no name can rebuild it; keep its state_dict() with safetensors instead"
        )
    for conversion in conversions(model):
        method = conversion.method
        if METHODS.get(method.name) is not type(method):
            raise ValueError(
                f"{method.name} is not in pliant.methods.METHODS, so load could not find it; register it "
                f"by an entry point of the group 'pliant.methods'"
            )
    given = {k: v for k, v in {**arguments_of(model), **(arguments or {})}.items() if v is not None}
    check_arguments(given)
    num_classes = given.get("num_classes") if hasattr(model, "num_classes") else None
    names = known.get("label_names")
    if told["classes"] is None and names and len(names) == num_classes:
        told["classes"] = names
    size = told["input_size"] or outside.input_size(model)
    if told["input_size"] is None and size and "img_size" in given:
        side = given["img_size"]
        size = (size[0], *(side if isinstance(side, Sequence) else (side, side)))
    told["input_size"] = size
    for name in ("mean", "std"):
        if told[name] is None and size and len(known.get(name) or ()) in (1, size[0]):
            told[name] = known[name]
    resizing: dict[str, Any] = {k: known.get(k) for k in ("interpolation", "crop_pct", "crop_mode")}
    rest = retold(known, input_size=size, num_classes=num_classes, label_names=told["classes"])
    return Config(
        network=known["architecture"],
        arguments=plain(given, "arguments"),
        methods=tuple(c.method for c in conversions(model) if not c.named),
        num_classes=num_classes,
        **resizing,
        pretrained_cfg={k: v for k, v in rest.items() if k not in (*_TOLD, *_LEFT) and _is_plain(v)},
        **{name: sequence(name, values) for name, values in told.items()},
        channels_last=outside.is_channels_last(model),
        state=state,
        versions={"pliant": __version__, "torch": str(torch.__version__), "timm": timm.__version__},
    )


def retold(known: Mapping[str, Any], **told: Any) -> dict[str, Any]:
    """A network's ``pretrained_cfg`` with other images or classes, without what was said of those before.

    Args:
        known: the ``pretrained_cfg``.
        told: ``input_size``, ``crop_pct``, ``num_classes``, ... that hold now; None leaves one as it is.

    Example:
        >>> known = timm.create_model("resnet50.a1_in1k").pretrained_cfg
        >>> new = retold(known, input_size=(3, 64, 64))
        >>> known["test_input_size"], new.get("test_input_size"), new["tag"]
        ((3, 288, 288), None, 'a1_in1k')
    """
    told = {k: v for k, v in told.items() if v is not None}
    other = {k for k, v in told.items() if k in known and v != known[k]}
    if "input_size" in other and tuple(told["input_size"][1:]) == tuple(known["input_size"][1:]):
        other.remove("input_size")  # of other channels alone
    gone = set()
    if other & {"input_size", "crop_pct"}:
        gone |= {"test_input_size", "test_crop_pct", "test_pool_size"}
    if other & {"num_classes", "label_names"}:
        gone |= {"label_names", "label_descriptions", "label_offset"} - told.keys()
    new = {k: v for k, v in {**known, **told}.items() if k not in gone}
    return {**new, "pool_size": None} if "input_size" in other and "pool_size" in new else new


def arguments_of(model: nn.Module) -> dict[str, Any]:
    """What timm recorded, brought up to date with the model's head, pool and image size."""
    arguments = dict(getattr(model, "_model_args", {}))
    current = getattr(timm.models, "get_model_args", None)
    if current is not None:
        arguments.update(current(model))
    else:
        arguments.update({k: getattr(model, k) for k in ("num_classes", "in_chans") if hasattr(model, k)})
        size = outside.input_size(model)
        if size and size[0] != 3:
            arguments.setdefault("in_chans", size[0])
    return {k: v for k, v in arguments.items() if not is_foreign(k)}


def _rebuild(config: Config, device: str) -> nn.Module:
    """The network that `config` describes, on `device`, with fresh weights."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        model = create(config.network, device, pretrained=False, **config.arguments)
        for method in config.methods:
            convert(model, method, inplace=True)
    told = {name: getattr(config, name) for name in _TOLD if getattr(config, name) is not None}
    known = config.pretrained_cfg
    if known is None:
        known = getattr(model, "pretrained_cfg", None) or {}
    else:
        known = {"architecture": config.network, **known}
    known = {**known, **told, "label_names": config.classes}
    # Not by attribute: these are notes on the module, which timm keeps there too.
    vars(model).update(pretrained_cfg=known, default_cfg=known, _model_args=dict(config.arguments))
    return model


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], config: Config) -> None:
    """Give `model` the tensors, in their dtypes, and the other state."""
    kinds = {t.dtype for t in tensors.values() if t.is_floating_point()}
    if len(kinds) == 1:  # then buffers that are not stored had it too
        model.to(kinds.pop())
    for name, own in model.state_dict(keep_vars=True).items():
        if name in tensors and own.dtype != tensors[name].dtype:
            own.data = own.data.to(tensors[name].dtype)
    try:
        model.load_state_dict({**tensors, **config.state})
    except Exception as error:  # set_extra_state may raise anything for a value that it did not write
        raise CheckpointError(f"the state of {config.network} cannot be restored: {error}") from error
    if config.channels_last:
        model.to(memory_format=torch.channels_last)


def _split_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict, as tensors that safetensors takes, and as plain values."""
    tensors: dict[str, Tensor] = {}
    state: dict[str, Any] = {}
    seen: set[int] = set()
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            state[name] = plain(value, name)
            continue
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in seen else tensor  # safetensors refuses sharing
        seen.add(storage)
    return tensors, state


def _is_plain(value: Any) -> bool:
    try:
        plain(value, "")
    except ValueError:
        return False
    return True


def _tensors(folder: Path, files: Mapping[str, bytes]) -> dict[str, Tensor]:
    """The tensors in the file of weights."""
    path = folder / WEIGHTS
    if WEIGHTS not in files:
        raise CheckpointError(f"{folder} has no {WEIGHTS}")
    data = files[WEIGHTS]
    try:
        return safetensors.torch.load(data)
    except Exception as error:  # SafetensorError, and what torch raises for a nonsensical header
        if len(data) < 9 or data[8:9] == b"{":  # eight bytes of length, then JSON
            raise CheckpointError(f"{path} is truncated or damaged ({len(data)} bytes): {error}") from error
        raise CheckpointError(f"{path} is no safetensors file: {error}") from error


def _check_structure(model: nn.Module, config: Config) -> None:
    """Refuse a network that `config` does not rebuild; costs no memory."""
    try:
        rebuilt = _rebuild(config, "meta")
    except Exception as error:  # as in `load`
        raise ValueError(f"{config.network} cannot be built again: {error}; {_ADVICE}") from error
    problem = difference(shapes(model.state_dict()), shapes(rebuilt.state_dict()))
    if not problem and ties(model) != ties(rebuilt):
        problem = (
            f"other tensors are shared: {some({'='.join(sorted(t)) for t in ties(model) ^ ties(rebuilt)})}"
        )
    if problem:
        raise ValueError(f"this network is not {config.network} {config.arguments}: {problem}; {_ADVICE}")


def _check_outputs(model: nn.Module, again: nn.Module, size: tuple[int, int, int] | None) -> None:
    """Refuse a network whose copy computes something else: a width is not all that matters."""
    if size is None:
        raise ValueError("nothing says which images this network takes; pass input_size=(C, H, W)")
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    if like.device.type != "cpu":  # on a GPU even the same network may differ from itself
        model = contextvars.Context().run(copy.deepcopy, model).cpu()
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(), evaluating(model):
            torch.manual_seed(0)
            x = torch.randn(1, *size, device="cpu").to(like.dtype)
            outputs = []
            for network in (model, again):
                torch.manual_seed(0)  # a method may draw
                # In an empty context: at the depth that is saved, not one that holds here only.
                outputs.append(contextvars.Context().run(network, x))
        torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0, equal_nan=True)
    except AssertionError as error:
        raise ValueError(f"rebuilt, the network computes something else; {_ADVICE} ({error})") from error
    except Exception as error:  # the network's own, for an image that it does not take
        raise ValueError(
            f"the network fails on an image of {size}: {error}; pass input_size=(C, H, W), or verify=False"
        ) from error


def _check_free(target: Path) -> None:
    """Refuse a place that holds something else than a checkpoint: it would be lost."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} exists and is no folder; choose another place")
    names = sorted(p.name for p in target.iterdir())
    try:
        ours = json.loads((target / CONFIG).read_text(encoding="utf-8")).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        ours = False
    if names and not (ours and set(names) <= {CONFIG, WEIGHTS}):
        raise ValueError(
            f"{target} exists and holds {some(names)}, which is not just a checkpoint of pliant and would "
            f"be lost; choose another folder"
        )
