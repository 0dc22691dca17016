"""What all engines have in common: `Engine`, and `FileEngine` for those that run a file.

Shapes: images [B, C, H, W]; what a runner returns is what the network returns, [B, classes].
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pliant.deploy.extras import install_line

Runner = Callable[[Tensor], Any]

# What PyTorch holds of a network. An engine that computes in int8 makes its file of one in float32.
PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.float32,
}


class Engine(ABC):
    """Something that runs a network.

    Attributes:
        name: name by which the engine is asked for.
        devices: kinds of device on which it runs.
        precisions: precisions in which it computes.
        packages: packages that it needs besides PyTorch, by the names under which they are
            imported; the last one runs networks.
        by_pytorch: whether PyTorch runs the network, so that images come in the precision and in
            a memory format; other engines take contiguous float32 images.
        native_precisions: precisions in which its ``write`` knows ``native=True``: parts as an operator in
            its own layout (`pliant.parts.Part.onnx_operator`), for this machine.
    """

    name: str
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    precisions: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16")
    packages: ClassVar[tuple[str, ...]] = ()
    by_pytorch: ClassVar[bool] = True
    native_precisions: ClassVar[tuple[str, ...]] = ()

    @property
    def missing(self) -> str:
        """What is not installed, and the line that installs it; empty if nothing is."""
        absent = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if not absent:
            return ""
        return f"{' and '.join(absent)} not installed: {install_line(self.packages[-1])}"

    @property
    def version(self) -> str:
        """Of what runs the network, such as ``onnxruntime 1.31.0``; empty for PyTorch itself."""
        if not self.packages or self.missing:
            return ""
        return f"{self.packages[-1]} {importlib.metadata.version(self.packages[-1])}"

    def unfit(self, device: str, precision: str) -> str:
        """Why it cannot run here, or not so; empty if it can.

        Args:
            device: ``cpu`` or ``cuda``.
            precision: ``float32``, ``bfloat16``, ``float16`` or ``int8``.
        """
        if device not in self.devices:
            return f"{self.name} is not supported on {device}, only on {', '.join(self.devices)}"
        if precision not in self.precisions:
            return f"{precision} is not supported by {self.name}, only {', '.join(self.precisions)}"
        return self.missing

    def images(self, images: Tensor, precision: str) -> Tensor:
        """`images` [B, C, H, W] as a runner takes them without converting them first."""
        return images.to(PRECISIONS[precision]) if self.by_pytorch else images.float().contiguous()

    def prepare(
        self,
        model: nn.Module,
        example: Tensor,
        *,
        precision: str = "float32",
        threads: int | None = None,
    ) -> Runner:
        """Make a network ready to run.

        Args:
            model: any network; it stays as it is, and runs as in evaluation mode. Whatever
                is to be optimised in it beforehand is the caller's, as `pliant.measure` does.
            example: images [B, C, H, W] of the shape, on the device and in the memory
                format that the runner will get.
            precision: ``float32``, or another where the engine can.
            threads: threads of the engine's pool; by default as many as PyTorch's pool has.

        Returns:
            A function from images to what the network returns, without gradients. It raises a
            ``ValueError`` for images of another shape (`Expected`); where it runs any number of
            images, the first dimension does not matter.

        Raises:
            ValueError: the engine is missing, or cannot run on that device or so precisely.
        """
        return self._prepare(model, example, precision, self._check(example, precision, threads))

    @abstractmethod
    def _prepare(self, model: nn.Module, example: Tensor, precision: str, threads: int) -> Runner:
        """As `prepare`, of what was checked."""

    def _check(self, example: Tensor, precision: str, threads: int | None) -> int:
        """The number of threads, if all else is well too."""
        if precision not in PRECISIONS:
            raise ValueError(f"no precision {precision!r}; there are {', '.join(PRECISIONS)}")
        if why := self.unfit(example.device.type, precision):
            raise ValueError(why)
        threads = torch.get_num_threads() if threads is None else threads
        if threads < 1:
            raise ValueError(f"threads must be at least 1, not {threads}")
        return threads


class FileEngine(Engine):
    """An engine that runs a file, with code of its own that may crash or hang.

    So the two steps are apart: `write` makes the file, and `load` makes a runner of it, each in
    this process or in one that it may take down.
    """

    def shared(self, precision: str = "float32", optimized: bool = False, native: bool = False) -> str:
        """Cache key of the exported file. Engines with equal keys share it, at any batch.

        Empty where a file serves only this engine and the batch of its example. The arguments are
        those of `write`.
        """
        return ""

    @abstractmethod
    def write(
        self,
        model: nn.Module,
        example: Tensor,
        folder: Path,
        *,
        precision: str = "float32",
        threads: int | None = None,
        optimized: bool = False,
        native: bool = False,
    ) -> Path:
        """Write what the engine runs into an empty folder.

        Args:
            model: as for `prepare`; so are `example`, `precision` and `threads`.
            example: images [B, C, H, W].
            folder: the empty folder.
            precision: precision of the engine.
            threads: threads of the engine.
            optimized: put parts into the form that suits the engine. What PyTorch makes has
                the parts that `model` has.
            native: compile the file for this machine, parts as operators in the engine's own
                layout (`Engine.native_precisions`).

        Returns:
            The path of the file.
        """

    @abstractmethod
    def load(
        self, path: Path, example: Tensor, *, precision: str = "float32", threads: int | None = None
    ) -> Runner:
        """A runner of a file that `write` made; `example` and the rest as for `prepare`."""

    def _prepare(self, model: nn.Module, example: Tensor, precision: str, threads: int) -> Runner:
        """Write a file, load it and drop it."""
        how: dict[str, Any] = {"precision": precision, "threads": threads}
        # What is loaded stays mapped on some systems, which then refuse to remove the file.
        with tempfile.TemporaryDirectory(prefix="pliant-", ignore_cleanup_errors=True) as folder:
            return self.load(self.write(model, example, Path(folder), **how), example, **how)


def evaluated(model: nn.Module, precision: str) -> nn.Module:
    """The network in evaluation and in a precision: itself, or a copy where it is otherwise."""
    dtype = PRECISIONS[precision]
    ready = not any(m.training for m in model.modules())
    if ready and all(p.dtype == dtype for p in model.parameters() if p.is_floating_point()):
        return model
    return copy.deepcopy(model).to(dtype).eval()


class Expected:
    """The images that a runner was made for; others are refused, before native code reads them.

    Args:
        example: images [B, C, H, W] of the shape and dtype that it was prepared with.
        precision: precision of the engine; images may have its dtype, or float32.
        any_batch: the number of images does not matter.

    Example:
        >>> Expected(torch.zeros(1, 3, 8, 8), "float32", any_batch=True).check(torch.zeros(2, 3, 8, 4))
        Traceback (most recent call last):
            ...
        ValueError: made for images [any, 3, 8, 8] of torch.float32, not [2, 3, 8, 4] of torch.float32
    """

    def __init__(self, example: Tensor, precision: str, any_batch: bool = False) -> None:
        self.shape, self.first = tuple(example.shape), 1 if any_batch else 0
        self.rest = self.shape[self.first :]
        self.dtypes = tuple(dict.fromkeys((example.dtype, PRECISIONS[precision], torch.float32)))

    def check(self, images: Tensor) -> None:
        """Raise a ValueError if `images` are others."""
        shape = images.shape
        fits = len(shape) == len(self.shape) and shape[self.first :] == self.rest and shape[0] > 0
        if not fits or images.dtype not in self.dtypes:
            wanted = ", ".join(map(str, ("any",) * self.first + self.rest))
            dtypes = " or ".join(map(str, self.dtypes))
            raise ValueError(f"made for images [{wanted}] of {dtypes}, not {list(shape)} of {images.dtype}")


def torch_runner(
    network: Callable[[Tensor], Any], expected: Expected, precision: str, threads: int
) -> Runner:
    """Run by PyTorch: in its precision, without gradients, on so many threads of its pool.

    The pool is the process's and keeps that number.
    """
    dtype = PRECISIONS[precision]

    def run(images: Tensor) -> Any:
        expected.check(images)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        with torch.inference_mode():
            return network(images.to(dtype))

    return run
