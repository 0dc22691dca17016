"""ONNX Runtime, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from pliant.deploy import onnx_file, onnx_native
from pliant.deploy.engines.files import ONNXEngine


class ONNXRuntime(ONNXEngine):
    """A session of ONNX Runtime with all of its graph optimisations.

    It runs a float model as it is, in float32: it has no bfloat16 for the CPU. In int8 it runs a
    file that its own static quantisation made (`pliant.deploy.int8`); in the native form one that
    is compiled for this machine (`pliant.deploy.onnx_native`).

    Example:
        >>> ONNXRuntime().unfit("cpu", "bfloat16")
        'bfloat16 is not supported by onnxruntime, only float32, int8'
    """

    name = "onnxruntime"
    precisions = ("float32", "int8")
    packages = ("onnx", "onnxscript", "onnxruntime")
    native_precisions = ("float32",)
    any_batch = True

    def _open(
        self, path: Path, example: Tensor, precision: str, threads: int
    ) -> Callable[[Tensor], tuple[Tensor, ...]]:
        # Of the files here only a compiled one has a library beside it.
        compiled = onnx_file.library_path(path).exists()
        library = onnx_native.check_here(path, onnx_file.facts_of(path)) if compiled else None
        return onnx_file.load(path, threads, library)
