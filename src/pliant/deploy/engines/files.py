"""Engines that run an ONNX file: the file, which is the same for all of them.

Shapes: images [B, C, H, W].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pliant.deploy.engines.base import FileEngine, evaluated
from pliant.parts import parts


class ONNXEngine(FileEngine):
    """An engine that runs an ONNX file, in float32 or in int8, of any number of images."""

    by_pytorch = False

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
    ) -> Path:
        """An ``.onnx`` file for any batch; see `FileEngine.write`."""
        self._check(example, precision, threads)
        network, images = evaluated(model, "float32"), example.float()
        path = folder / "network.onnx"
        if precision == "int8":
            return _write_int8(network, images, path, optimized)
        return write_onnx(network, images, path, optimized)


def write_onnx(
    model: nn.Module, example: Tensor, path: Path, optimized: bool, compiled: bool = False
) -> Path:
    """Write a network as ONNX file for any batch.

    A network with parts that have an export form goes as it is through PyTorch's exporter, unless
    that form is asked for; that, and every other network, is what `export` writes.

    Args:
        model: in evaluation mode.
        example: images [B, C, H, W], float32.
        path: path of the file.
        optimized: bring parts into the form that suits the engine.
        compiled: as `export` takes it; that is then the best form.
    """
    from pliant.deploy.export import export  # on use: it is not needed to import pliant

    example = example.contiguous()
    formed = any(part.export_form("onnx", None) is not part for part in parts(model).values())
    if optimized or compiled or not formed:
        return export(model, path, example, batches=(1,), compiled=compiled)
    # What PyTorch makes of it, for any batch.
    images = example[:1].repeat(2, 1, 1, 1)  # of one image it would make a file for one image
    batch: Any = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        torch.onnx.export(
            model, (images,), str(path), dynamo=True, dynamic_shapes=({0: batch},), verbose=False
        )
    return path


def _write_int8(model: nn.Module, example: Tensor, path: Path, optimized: bool) -> Path:
    """Write a network as ONNX file in 8-bit integers (`pliant.deploy.int8`).

    Its ranges are those of random images: it is for timing.
    """
    from pliant.deploy.int8 import quantise, random_images

    source = write_onnx(model, example, path.with_name("float32.onnx"), optimized)
    return quantise(source, path, random_images(example))
