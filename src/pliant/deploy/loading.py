"""Run an exported file, whatever its format: `open_export`.

Shapes: images [B, C, H, W] as the file takes them; outputs as the network gives them, float32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pliant.deploy import onnx_file, onnx_native, openvino_file, program
from pliant.deploy.facts import Facts, read_report, report_path
from pliant.deploy.selections import as_tuple, one_or_several

_FORMATS: dict[str, Any] = {".pt2": program, ".onnx": onnx_file, ".xml": openvino_file}
_log = logging.getLogger(__name__)


class ExportedNetwork:
    """A file that `pliant.export` wrote, to be called with images, from any number of threads.

    Attributes:
        path: path of the file.
        facts: what it says of itself.
        finite: refuse images that hold NaN or infinity.
    """

    def __init__(
        self, path: Path, facts: Facts, run: Callable[[Tensor], Any], finite: bool = False
    ) -> None:
        self.path, self.facts, self.finite, self._run = path, facts, finite, run

    def __call__(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The outputs for `images`: a tensor, or several in a tuple.

        Raises:
            ValueError: images of another shape or type than the file takes; with `finite`, images with
                NaN or infinity.
        """
        name, batch, size = self.path.name, self.facts.batch, self.facts.input_size
        kind = torch.uint8 if self.facts.takes == "uint8" else torch.float32
        wanted = ", ".join(map(str, ("any" if batch is None else batch, *size)))
        if not isinstance(images, Tensor):
            raise ValueError(
                f"{name} takes a tensor, {kind} images of [{wanted}], not a {type(images).__name__}; give "
                f"torch.as_tensor(images)"
            )
        fits = images.dim() == 4 and tuple(images.shape[1:]) == size and len(images) > 0
        if not fits or batch not in (None, len(images)) or images.dtype != kind:
            raise ValueError(
                f"{name} takes {kind} images of [{wanted}], not {images.dtype} of {list(images.shape)}"
            )
        images = images.detach().cpu().contiguous()
        if self.finite and not bool(images.isfinite().all()):
            raise ValueError(
                f"the images for {name} hold NaN or infinity, of which no output means anything"
            )
        with torch.no_grad():
            return one_or_several(as_tuple(self._run(images)))

    def example(self, batch: int | None = None) -> Tensor:
        """Random images [batch, C, H, W] as the file takes them; by default as many as it takes, or one."""
        images = torch.rand(batch or self.facts.batch or 1, *self.facts.input_size)
        return (255 * images).byte() if self.facts.takes == "uint8" else images


class FileNetwork(nn.Module):
    """An exported file in the place of a network, for `pliant.evaluate`: any number of images.

    Args:
        opened: the file.

    Attributes:
        pretrained_cfg: size, mean and deviation of the images that it takes, how timm prepares them, and
            the names of the classes.
    """

    def __init__(self, opened: ExportedNetwork) -> None:
        super().__init__()
        self.opened, facts = opened, opened.facts
        inside = facts.takes != "normalised"  # the file normalises
        given = ((0.0,), (1.0,)) if inside else (facts.mean, facts.std)
        # One value may stand for all channels.
        mean, std = (v and v * (facts.input_size[0] // len(v)) for v in given)
        self.pretrained_cfg = {
            **facts.preparation,
            "architecture": facts.network,
            "input_size": facts.input_size,
            "mean": mean,
            "std": std,
            "label_names": facts.classes,
        }

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The file's outputs for `x` [B, C, H, W], float images as `pretrained_cfg` says, on its device."""
        facts = self.opened.facts
        images = (255 * x).round().clamp(0, 255).to(torch.uint8) if facts.takes == "uint8" else x.float()
        step = facts.batch or len(images)
        found = []
        for some in torch.split(images, step):
            whole = torch.cat([some, some[:1].expand(step - len(some), *some.shape[1:])])
            found.append([y[: len(some)].to(x.device) for y in as_tuple(self.opened(whole))])
        return one_or_several(tuple(torch.cat(parts) for parts in zip(*found, strict=True)))


def is_export(path: str | Path) -> bool:
    """Whether there is a file at `path` whose ending says that it may be an exported network.

    Example:
        >>> is_export("resnet50"), is_export("no/such/net.onnx")
        (False, False)
    """
    path = Path(path)
    return path.suffix in _FORMATS and path.is_file()


def engine_of(facts: Facts) -> str:
    """Name of the engine, among `pliant.deploy.engines.ENGINES`, in which a file runs.

    Example:
        >>> from types import SimpleNamespace as Of
        >>> [engine_of(Of(format=f, compiled=c)) for f, c in (("onnx", True), ("pt2", False))]
        ['onnxruntime', 'eager']
    """
    if facts.format == "pt2":
        return "aoti" if facts.compiled else "eager"
    return "onnxruntime" if facts.format == "onnx" else "openvino"


def read_facts(path: str | Path) -> Facts:
    """What an exported file says of itself.

    Raises:
        ValueError: another ending, or no file that `pliant.export` wrote.
    """
    path = _known(path)
    facts: Facts = _FORMATS[path.suffix].facts_of(path)
    return facts


def _known(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix not in _FORMATS:
        raise ValueError(f"{path.name}: the ending must be one of {', '.join(_FORMATS)}")
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    return path


def check_threads(threads: int | None) -> None:
    """Refuse a number of threads that there is not; None is as many as there are.

    Raises:
        ValueError: it is no whole number of at least 1.
    """
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise ValueError(f"threads must be a whole number of at least 1, not {threads!r}")


def open_export(path: str | Path, *, threads: int | None = None, finite: bool = False) -> ExportedNetwork:
    """Open a file that `pliant.export` wrote, in its own engine on the CPU.

    The file is first compared with the SHA-256 in its report, ``FILE.json``, so that a damaged one is
    refused. Without a report, a portable file is opened and a warning logged. A compiled file is
    machine code, which runs with all your rights: it is refused without its report, and should be
    opened only where you trust whoever made it. A portable file can hold no code: its pickled
    values are read as tensors or refused.

    What comes back may be called from several threads at once.

    Args:
        path: path of the ``.pt2``, ``.onnx`` or ``.xml``.
        threads: threads of the engine; None: as many as the engine takes. PyTorch gets them for
            each call. What AOTInductor compiled runs partly on as many as PyTorch had then.
        finite: check each call's images, and refuse NaN and infinity. OpenVINO turns NaN into finite
            outputs; the other engines give NaN.

    Raises:
        ValueError: no such file, a file that is not what its report says, a package is missing, no
            such number of threads, or the file was compiled for another machine or another ONNX Runtime.

    Example:
        >>> import tempfile, timm, pliant
        >>> model = timm.create_model("resnet20_cifar").eval()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     net = open_export(pliant.export(model, f"{folder}/net.pt2"))
        >>> net(torch.zeros(3, 3, 32, 32)).shape
        torch.Size([3, 10])
    """
    path = _known(path)
    check_threads(threads)
    report = report_path(path)
    if report.is_file():
        read_report(path)
    facts = read_facts(path)
    if not report.is_file():
        if facts.compiled:
            raise ValueError(
                f"{path.name} is machine code, and its report {report.name} is not beside it, so it is not "
                f"opened: copy the report too, or export the file again"
            )
        _log.warning(
            "%s has no report %s beside it, so nothing tells whether it is damaged", path, report.name
        )
    how: dict[str, Any] = {"threads": threads}
    if facts.compiled and path.suffix == ".onnx":
        how["library"] = onnx_native.check_here(path, facts)
    return ExportedNetwork(path, facts, _FORMATS[path.suffix].load(path, **how), finite)
