"""Export the depths of an adaptive network to one folder, with what each costs: `export_depths`.

Shapes: images [1, C, H, W] for the latencies.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pliant._files import atomic_path
from pliant.compiling import torch_threads
from pliant.counting import count_macs, count_parameters
from pliant.deploy.export import FORMATS, Progress, export
from pliant.deploy.facts import read_report
from pliant.deploy.loading import check_threads, open_export
from pliant.measuring.clock import Clock, clock, race
from pliant.measuring.latency import median, spread
from pliant.methods.adaptive_depth.depth import subnet
from pliant.methods.adaptive_depth.switch import (
    Skip,
    SkipLike,
    check_skip,
    check_skips,
    depth_name,
    find_depth,
)
from pliant.provenance import provenance
from pliant.train.distillation import digest

MANIFEST = "manifest.json"
UNFINISHED = "unfinished.json"  # until the manifest is written: the files that are whole
Format = Literal["pt2", "onnx", "xml"]


@dataclass(frozen=True)
class DepthFile:
    """One depth of a network, in a file.

    Attributes:
        file: name of the file in the folder.
        skip: flags of the depth.
        parameters: number of parameters.
        macs: multiply-accumulates of one image.
        batch: images of each call that was timed: one, if the file takes any number.
        latency_ms: median time of such a call in the file's engine on the CPU, in ms; None: not
            measured.
        latency_iqr_ms: interquartile range over the rounds, in ms.
        max_rel_error: largest relative error of an output against the network.
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
        depths: the files, in the order in which they were asked for.
        threads: threads of the engine while the latencies were measured.
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
    skips: Iterable[SkipLike] | None = None,
    *,
    format: Format = "onnx",  # noqa: A002 - the word that a user looks for
    threads: int | None = None,
    rounds: int = 9,
    progress: Progress | None = None,
    **options: Any,
) -> Manifest:
    """Export chosen depths of an adaptive network, time them, and list them in a manifest.

    If a depth fails, or the export is interrupted, the depths that are finished stay, and the same
    call goes on with the others.

    Args:
        model: a network converted by `AdaptiveDepth`; it stays as it is.
        folder: a folder for ``depth-TTFF.onnx`` and so on, and ``manifest.json``, which is written
            last (`read_manifest`): new, empty, or of this export when it was interrupted.
        skips: which depths, such as ``["TTFF", "FFFF"]``; None: all.
        format: ``onnx``, ``pt2`` or ``xml``.
        threads: threads of the engine; None: as many as PyTorch has.
        rounds: how often each file is timed, in turn; 0: not at all.
        progress: called with depths done, steps in all, and what comes next.
        options: options of `pliant.export`.

    Returns:
        What the manifest says.

    Raises:
        ValueError: the network has no adaptive depth; wrong flags; an unknown format; a wrong
            number of threads or rounds; a folder that holds something else; as `pliant.export`.

    Example:
        >>> import tempfile, timm
        >>> model = timm.create_model("resnet20_cifar_adn").eval()
        >>> with tempfile.TemporaryDirectory() as place:
        ...     made = export_depths(model, place, ["TTT"], format="pt2", rounds=1)
        >>> made.depths[0].file, made.depths[0].macs
        ('depth-TTT.pt2', 26395264)
    """
    chosen = check_skips(skips, len(find_depth(model).skip))
    if f".{format}" not in FORMATS:
        raise ValueError(f"format is {format!r}; it must be one of {', '.join(f[1:] for f in FORMATS)}")
    if not isinstance(rounds, int) or rounds < 0:
        raise ValueError(f"rounds must be a whole number of at least 0, not {rounds!r}")
    check_threads(threads)
    threads = threads or torch.get_num_threads()
    tell = progress or (lambda _done, _total, _what: None)
    steps = len(chosen) + 1
    plain = {k: tuple(v.shape) if isinstance(v, Tensor) else v for k, v in sorted(options.items())}
    ends = [digest(subnet(model, (end,) * len(chosen[0]), share=True)) for end in (False, True)]
    with _keeping(Path(folder), f"{ends}, {threads} threads, {plain}") as finished:
        found = []
        for n, skip in enumerate(chosen):
            cut, file = subnet(model, skip), Path(folder) / f"depth-{depth_name(skip)}.{format}"
            with torch_threads(threads):  # machine code is compiled for so many
                if not finished.has(file):
                    export(cut, file, progress=partial(_tell, tell, n, steps), **options)
                    finished.add(file)
                opened = open_export(file, threads=threads)
            error = read_report(file).parity.max_rel_error
            size = opened.facts.network_size
            found.append((skip, opened, count_parameters(cut), count_macs(cut, size), error))
        tell(len(chosen), steps, "timing all in turn")
        times = race(
            {skip: _clock(opened, threads) for skip, opened, *_ in found}, rounds, min_run_time=0.05
        )
        depths = []
        for skip, opened, parameters, macs, error in found:
            ms = [1000 * s for s in times[skip]]
            batch = opened.facts.batch or 1
            depths.append(
                DepthFile(opened.path.name, skip, parameters, macs, batch, median(ms), spread(ms), error)
            )
        manifest = Manifest(tuple(depths), threads, rounds, dict(provenance()))
        with atomic_path(Path(folder) / MANIFEST) as temporary:
            temporary.write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
    tell(steps, steps, "done")
    return manifest


def _tell(tell: Progress, done: int, total: int, _done: int, _total: int, what: str) -> None:
    tell(done, total, what)


class _Finished:
    """Which files of an export that is not finished are.

    Args:
        folder: that holds them, and says so in a file of its own.
        made_of: what they are of: weights and options.

    Raises:
        ValueError: the folder holds something else.
    """

    def __init__(self, folder: Path, made_of: str) -> None:
        self.path, self.made_of = folder / UNFINISHED, made_of
        self.files: list[str] = []
        if self.path.is_file():
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["made_of"] != made_of:
                raise ValueError(
                    f"{folder} holds an export that was interrupted, of another network or with other "
                    f"options; name a new folder, or empty this one"
                )
            self.files = content["files"]
        elif folder.exists() and (not folder.is_dir() or any(f.name[0] != "." for f in folder.iterdir())):
            raise ValueError(f"{folder} is not an empty folder; name a new one, or empty it")

    def has(self, file: Path) -> bool:
        """Whether a file is there, and whole."""
        if file.name not in self.files:
            return False
        try:
            read_report(file)
        except ValueError:  # damaged meanwhile
            return False
        return True

    def add(self, file: Path) -> None:
        """Note that a file is finished."""
        self.files = list(dict.fromkeys([*self.files, file.name]))
        with atomic_path(self.path) as temporary:
            content = {"made_of": self.made_of, "files": self.files}
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _keeping(folder: Path, made_of: str) -> Iterator[_Finished]:
    """The finished files of an export to `folder`; a folder in which none was finished goes again."""
    new = not folder.exists()
    finished = _Finished(folder, made_of)
    try:
        yield finished
        finished.path.unlink(missing_ok=True)
    finally:
        if new and not finished.files:
            with suppress(OSError):  # it was not made, or holds what somebody else put there
                folder.rmdir()


def read_manifest(folder: str | Path) -> Manifest:
    """Read the manifest that `export_depths` wrote to a folder.

    Raises:
        ValueError: there is no manifest, or a damaged one.
    """
    path = Path(folder) / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        depths = tuple(DepthFile(**{**d, "skip": check_skip(d["skip"])}) for d in content.pop("depths"))
        return Manifest(depths, **content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no manifest of export_depths: {error}") from error


def _clock(opened: Any, threads: int) -> Clock:
    """What times an opened file on random images of its own."""
    return clock(partial(opened, opened.example()), threads)
