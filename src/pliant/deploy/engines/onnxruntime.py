"""ONNX Runtime, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pliant.deploy.engines.base import FileEngine, Runner, evaluated, outputs
from pliant.deploy.engines.files import write_file, write_int8
from pliant.deploy.onnx_file import open_session


class ONNXRuntime(FileEngine):
    """A session of ONNX Runtime with all of its graph optimisations.

    It runs a float model as it is, in float32: it has no bfloat16 for the CPU. In int8 it runs a
    file that its own static quantisation made (`pliant.deploy.int8`).

    Example:
        >>> ONNXRuntime().unfit("cpu", "bfloat16")
        'bfloat16 is not supported by onnxruntime, only float32, int8'
    """

    name = "onnxruntime"
    devices = ("cpu",)
    precisions = ("float32", "int8")
    packages = ("onnx", "onnxscript", "onnxruntime")
    by_pytorch = False
    native_precisions = ("float32",)

    def shared(self, precision: str = "float32", optimized: bool = False, native: bool = False) -> str:
        """An ONNX file is for any batch; see `FileEngine.shared`."""
        return f"{precision} onnx{' optimized' * optimized}{' native' * native}"

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
        """An ``.onnx`` file for any batch; see `FileEngine.write`.

        With `native`, compiled for this machine (`pliant.deploy.onnx_native`).
        """
        self._check(example, precision, threads)
        network = evaluated(model, precision)
        if precision == "int8":
            return write_int8(network, example, folder, optimized)
        path = folder / "network.onnx"
        return write_file(network, example, path, optimized, dynamic_batch=True, compiled=native)

    def load(
        self, path: Path, example: Tensor, *, precision: str = "float32", threads: int | None = None
    ) -> Runner:
        """A session; see `FileEngine.load`."""
        threads = self._check(example, precision, threads)
        session = open_session(path, threads)
        (name,) = (i.name for i in session.get_inputs())

        def run(images: Tensor) -> Any:
            found = session.run(None, {name: self.images(images, precision).numpy()})
            return outputs([torch.from_numpy(array) for array in found])

        return run
