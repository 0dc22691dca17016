"""ONNX Runtime, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pliant.deploy.engines.base import Expected, Runner, evaluated, outputs
from pliant.deploy.engines.files import ONNXEngine, write_onnx
from pliant.deploy.onnx_file import facts_of, library_path, open_session
from pliant.deploy.onnx_native import check_here


class ONNXRuntime(ONNXEngine):
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
    native_precisions = ("float32",)

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
        if not native:
            how: dict[str, Any] = {"precision": precision, "threads": threads, "optimized": optimized}
            return super().write(model, example, folder, **how)
        self._check(example, precision, threads)
        network = evaluated(model, precision)
        return write_onnx(network, example, folder / "network.onnx", optimized, compiled=True)

    def load(
        self, path: Path, example: Tensor, *, precision: str = "float32", threads: int | None = None
    ) -> Runner:
        """A session; see `FileEngine.load`."""
        threads = self._check(example, precision, threads)
        facts = facts_of(path) if library_path(path).exists() else None
        library = check_here(path, facts) if facts is not None and facts.compiled else None
        session = open_session(path, threads, library)
        (made,) = session.get_inputs()
        name = made.name
        expected = Expected(example, precision, any_batch=not isinstance(made.shape[0], int))

        def run(images: Tensor) -> Any:
            expected.check(images)
            found = session.run(None, {name: self.images(images, precision).numpy()})
            return outputs([torch.from_numpy(array) for array in found])

        return run
