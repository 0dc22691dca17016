"""Engines that run an ONNX file: the file, which is the same for all of them.

Shapes: images [B, C, H, W].
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pliant.deploy.engines.base import Expected, FileEngine, Runner, evaluated
from pliant.deploy.export import export
from pliant.deploy.int8 import quantise, random_images
from pliant.deploy.onnx_file import INPUT
from pliant.deploy.selections import one_or_several
from pliant.parts import parts


class ONNXEngine(FileEngine):
    """An engine that runs an ONNX file, in float32 or in int8, on the CPU.

    Attributes:
        any_batch: whether it runs any number of images; otherwise those of its example.
    """

    devices = ("cpu",)
    by_pytorch = False
    any_batch: ClassVar[bool] = False

    def shared(self, precision: str = "float32", optimized: bool = False, native: bool = False) -> str:
        """By numbers and form; see `FileEngine.shared`. A bfloat16 of the engine's own is float32 here."""
        numbers = "int8" if precision == "int8" else "float32"
        return f"{numbers} onnx{' optimized' * optimized}{' native' * native}"

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
        """An ``.onnx`` file for any batch; see `FileEngine.write`."""
        self._check(example, precision, threads)
        if native and precision not in self.native_precisions:
            raise ValueError(f"{self.name} has no native form in {precision}")
        network, images = evaluated(model, "float32"), example.float().contiguous()
        path = folder / "network.onnx"
        return _write(network, images, path, optimized, native, precision == "int8")

    def load(
        self, path: Path, example: Tensor, *, precision: str = "float32", threads: int | None = None
    ) -> Runner:
        """A session or compiled model; see `FileEngine.load`."""
        network = self._open(path, example, precision, self._check(example, precision, threads))
        expected = Expected(example, precision, self.any_batch)

        def run(images: Tensor) -> Any:
            expected.check(images)
            return one_or_several(network(self.images(images, precision)))

        return run

    @abstractmethod
    def _open(
        self, path: Path, example: Tensor, precision: str, threads: int
    ) -> Callable[[Tensor], tuple[Tensor, ...]]:
        """A function that runs the file on images such as `example`."""


def _write(
    model: nn.Module, example: Tensor, path: Path, optimized: bool, compiled: bool, quantised: bool
) -> Path:
    """Write a network as ONNX file for any batch.

    A network with parts that have an export form goes as it is through PyTorch's exporter, unless
    that form is asked for; that, and every other network, is what `export` writes. In 8-bit integers the
    ranges are those of random images, and any answers will do: the file is only timed.
    """
    formed = any(part.export_form("onnx", None) is not part for part in parts(model).values())
    if optimized or compiled or not formed:
        how: dict[str, Any] = {"compiled": compiled}
        if quantised:
            how = {"precision": "int8", "calibrate": random_images(example), "tolerance": math.inf}
        return export(model, path, example, batches=(1,), **how)
    written = path.with_name("float32.onnx") if quantised else path
    images = example[:1].repeat(2, 1, 1, 1)  # of one image it would make a file for one image
    batch: Any = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        torch.onnx.export(
            model,
            (images,),
            str(written),
            dynamo=True,
            dynamic_shapes=({0: batch},),
            input_names=[INPUT],
            verbose=False,
        )
    return quantise(written, path, random_images(example))[0] if quantised else path
