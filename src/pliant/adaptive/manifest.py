"""Depths of an adaptive network as files in one folder, with what each costs: `export_depths`.

Shapes: images [1, C, H, W] for the latencies.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from pliant._files import atomic_path
from pliant.compiling import torch_threads
from pliant.counting import count_macs, count_parameters
from pliant.deploy.export import FORMATS, export
from pliant.deploy.facts import read_report
from pliant.deploy.loading import check_threads, open_export
from pliant.methods.adaptive_depth.depth import subnet
from pliant.methods.adaptive_depth.switch import Skip, check_skip, find_depth
from pliant.provenance import provenance

MANIFEST = "manifest.json"
Format = Literal["pt2", "onnx", "xml"]


@dataclass(frozen=True)
class DepthFile:
    """One depth of a network, in a file.

    Attributes:
        file: its name in the folder.
        skip: the depth's flags.
        parameters: in it.
        macs: multiply-accumulates of one image.
        batch: images of each call that was timed: one, if the file takes any number.
        latency_ms: median of such a call in its engine on the CPU; None: not measured.
        latency_iqr_ms: interquartile range over the rounds.
        max_rel_error: largest error of an output against the network, relative.
    """

    file: str
    skip: Skip
    parameters: int
    macs: int
    batch: int
    latency_ms: float | None
    latency_iqr_ms: float | None
    max_rel_error: float


@dataclass(frozen=True)
class Manifest:
    """What a folder of depths holds.

    Attributes:
        depths: the files, deepest first.
        threads: of the engine, whichever it is, while the latencies were measured.
        rounds: how often each file was timed, in turn.
        origin: machine, versions, commit and date.
    """

    depths: tuple[DepthFile, ...]
    threads: int
    rounds: int
    origin: dict[str, Any]


def export_depths(
    model: nn.Module,
    folder: str | Path,
    skips: Sequence[Sequence[bool]] | None = None,
    *,
    format: Format = "onnx",  # noqa: A002 - the word that a user looks for
    threads: int | None = None,
    rounds: int = 9,
    **options: Any,
) -> Manifest:
    """Export chosen depths of an adaptive network, time them, and list them in a manifest.

    Args:
        model: a network converted by `AdaptiveDepth`; it stays as it is.
        folder: new or empty; gets ``depth-TTFF.onnx`` (a letter a stage, T skips) and so on, and
            ``manifest.json``, written last (`read_manifest`). If a depth fails, those before it go
            as well.
        skips: which depths; None: all.
        format: ``onnx``, ``pt2`` or ``xml``.
        threads: of the engine; None: as many as PyTorch has.
        rounds: how often each file is timed, in turn; 0: not at all.
        options: of `export`.

    Returns:
        What the manifest says.

    Raises:
        ValueError: the network has no adaptive depth; wrong flags; a format or a number of threads
            that there is not; a folder that holds something; as `export`.

    Example:
        >>> import tempfile, timm
        >>> model = timm.create_model("resnet20_cifar_adn").eval()
        >>> with tempfile.TemporaryDirectory() as place:
        ...     made = export_depths(model, place, [(True,) * 3], format="pt2", rounds=1)
        >>> made.depths[0].file, made.depths[0].macs
        ('depth-TTT.pt2', 26395264)
    """
    flags = len(find_depth(model).skip)
    chosen = [
        check_skip(list(s), flags)
        for s in (product((False, True), repeat=flags) if skips is None else skips)
    ]
    if f".{format}" not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(f[1:] for f in FORMATS)}; not {format!r}")
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"skips must hold different depths, not {chosen}")
    if not isinstance(rounds, int) or rounds < 0:
        raise ValueError(f"rounds must be a whole number of at least 0, not {rounds!r}")
    check_threads(threads)
    threads = threads or torch.get_num_threads()
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already and is not an empty folder; name another")
    names = {skip: "depth-" + "".join("FT"[s] for s in skip) for skip in chosen}
    with _undone(folder, list(names.values())):
        found = []
        for skip in chosen:
            cut, file = subnet(model, skip), folder / f"{names[skip]}.{format}"
            with torch_threads(threads):  # machine code is compiled for so many
                opened = open_export(export(cut, file, **options), threads=threads)
            error = read_report(file).parity.max_rel_error
            size = opened.facts.network_size
            found.append((skip, opened, count_parameters(cut), count_macs(cut, size), error))
        times = _race([opened for _, opened, *_ in found], rounds, threads)
        depths = tuple(
            DepthFile(
                opened.path.name, skip, parameters, macs, opened.facts.batch or 1, *_middle(ms), error
            )
            for (skip, opened, parameters, macs, error), ms in zip(found, times, strict=True)
        )
        manifest = Manifest(depths, threads, rounds, dict(provenance()))
        with atomic_path(folder / MANIFEST) as temporary:
            temporary.write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
    return manifest


@contextmanager
def _undone(folder: Path, names: list[str]) -> Iterator[None]:
    """If the block raises, files of these names go, whatever their endings; and a folder that is new."""
    new = not folder.exists()
    try:
        yield
    except BaseException:
        for name in names:
            for file in folder.glob(f"{name}.*"):
                file.unlink(missing_ok=True)
        if new:
            with suppress(OSError):  # it was not made, or holds what somebody else put there
                folder.rmdir()
        raise


def read_manifest(folder: str | Path) -> Manifest:
    """What `export_depths` wrote about a folder.

    Raises:
        ValueError: there is no manifest, or a damaged one.
    """
    path = Path(folder) / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        depths = tuple(DepthFile(**{**d, "skip": check_skip(d["skip"])}) for d in content.pop("depths"))
        return Manifest(depths, **content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no manifest of depths: {error}") from error


def _race(files: list[Any], rounds: int, threads: int) -> list[list[float]]:
    """Milliseconds of one image in each file, all in turn in each round."""
    from torch.utils.benchmark import Timer  # on use: it looks for compilers as it loads

    times: list[list[float]] = [[] for _ in files]
    for n in range(rounds):
        for file, ms in zip(files, times, strict=True):
            batch = file.facts.batch or 1
            images = torch.zeros(batch, *file.facts.input_size)
            images = images.byte() if file.facts.takes == "uint8" else torch.randn_like(images)
            timer = Timer("run(images)", globals={"run": file, "images": images}, num_threads=threads)
            if not n:
                timer.timeit(2)  # warms up
            ms.append(1000 * timer.blocked_autorange(min_run_time=0.05).median)
    return times


def _middle(ms: list[float]) -> tuple[float | None, float | None]:
    """Median and interquartile range."""
    if not ms:
        return None, None
    if len(ms) == 1:
        return ms[0], None
    low, middle, high = statistics.quantiles(ms, n=4, method="inclusive")
    return middle, high - low
