"""Run an exported file, whatever its format: `open_export`.

Shapes: images [B, C, H, W] as the file takes them; outputs as the network gives them, float32.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pliant.deploy import onnx_file, onnx_native, openvino_file, program
from pliant.deploy.facts import Facts
from pliant.deploy.selections import as_tuple, one_or_several

_FORMATS: dict[str, Any] = {".pt2": program, ".onnx": onnx_file, ".xml": openvino_file}


class ExportedNetwork:
    """A file that `pliant.export` wrote, to be called with images.

    Attributes:
        path: path of the file.
        facts: what it says of itself.
    """

    def __init__(self, path: Path, facts: Facts, run: Callable[[Tensor], Any]) -> None:
        self.path, self.facts, self._run = path, facts, run

    def __call__(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The outputs for `images`: a tensor, or several in a tuple.

        Raises:
            ValueError: images of another shape or type than the file takes.
        """
        batch, size = self.facts.batch, self.facts.input_size
        kind = torch.uint8 if self.facts.takes == "uint8" else torch.float32
        fits = images.dim() == 4 and tuple(images.shape[1:]) == size and len(images) > 0
        if not fits or batch not in (None, len(images)) or images.dtype != kind:
            shape = ", ".join(map(str, ("any" if batch is None else batch, *size)))
            raise ValueError(
                f"{self.path.name} takes {kind} images of [{shape}], not {images.dtype} of "
                f"{list(images.shape)}"
            )
        with torch.no_grad():
            return one_or_several(as_tuple(self._run(images.contiguous())))


def read_facts(path: str | Path) -> Facts:
    """What an exported file says of itself.

    Raises:
        ValueError: another ending, or no file that `pliant.export` wrote.
    """
    path = Path(path)
    if path.suffix not in _FORMATS:
        raise ValueError(f"{path.name}: the ending must be one of {', '.join(_FORMATS)}")
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    facts: Facts = _FORMATS[path.suffix].facts_of(path)
    return facts


def check_threads(threads: int | None) -> None:
    """Refuse a number of threads that there is not; None is as many as there are.

    Raises:
        ValueError: it is no whole number of at least 1.
    """
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise ValueError(f"threads must be a whole number of at least 1, not {threads!r}")


def open_export(path: str | Path, *, threads: int | None = None) -> ExportedNetwork:
    """Open a file that `pliant.export` wrote, in its own engine on the CPU.

    Args:
        path: path of the ``.pt2``, ``.onnx`` or ``.xml``.
        threads: threads of the engine; None: as many as the engine takes. PyTorch gets them for
            each call. What AOTInductor compiled runs partly on as many as PyTorch had then.

    Raises:
        ValueError: no such file, a package is missing, no such number of threads, or the file was
            compiled for another machine or another ONNX Runtime.

    Example:
        >>> import tempfile, timm, pliant
        >>> model = timm.create_model("resnet20_cifar").eval()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     net = open_export(pliant.export(model, f"{folder}/net.pt2"))
        >>> net(torch.zeros(3, 3, 32, 32)).shape
        torch.Size([3, 10])
    """
    path = Path(path)
    facts = read_facts(path)
    check_threads(threads)
    if facts.compiled and path.suffix == ".onnx":
        onnx_native.check_here(path, facts)
    return ExportedNetwork(path, facts, _FORMATS[path.suffix].load(path, threads))
