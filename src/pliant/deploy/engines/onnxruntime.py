"""ONNX Runtime, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pliant.deploy.engines.base import FileEngine, Runner, evaluated, outputs
from pliant.deploy.engines.files import write_file, write_int8
from pliant.deploy.extras import onnx_runtime


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

    def any_batch(self, optimized: bool = False) -> bool:
        """Yes."""
        return True

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
        network = evaluated(model, precision)
        if precision == "int8":
            return write_int8(network, example, folder, optimized)
        path = folder / "network.onnx"
        return write_file(network, example, path, optimized, dynamic_batch=True)

    def load(
        self, path: Path, example: Tensor, *, precision: str = "float32", threads: int | None = None
    ) -> Runner:
        """A session; see `FileEngine.load`."""
        threads = self._check(example, precision, threads)
        ort = onnx_runtime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        (name,) = (i.name for i in session.get_inputs())

        def run(images: Tensor) -> Any:
            found = session.run(None, {name: self.images(images, precision).numpy()})
            return outputs([torch.from_numpy(array) for array in found])

        return run
