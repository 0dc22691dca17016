"""AOTInductor: the network as a package of machine code, without Python."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from pliant.compiling import torch_threads
from pliant.deploy.engines.base import (
    PRECISIONS,
    Expected,
    FileEngine,
    Runner,
    evaluated,
    torch_runner,
)
from pliant.deploy.program import package
from pliant.parts import named_operators, parts

OPERATORS = "pliant.operators"  # in a package's metadata: modules of the native operators it calls


class AOTInductor(FileEngine):
    """`torch.export`, compiled ahead of time by Inductor, for one shape of input.

    Weights are frozen into the package. Precision as for `Eager`.

    Example:
        >>> AOTInductor().unfit("cpu", "float32")
        ''
    """

    name = "aoti"

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
        """A ``.pt2`` package; see `FileEngine.write`."""
        threads = self._check(example, precision, threads)
        network = evaluated(model, precision)
        path, on_cpu = folder / "network.pt2", example.device.type == "cpu"
        # A part with a fast form is not in it, and runs no operator of its own.
        called = {p.operators for p in parts(network).values() if on_cpu and p.fast_form() is None}
        with torch_threads(threads), torch.no_grad():
            program = torch.export.export(network, (example.to(PRECISIONS[precision]),))
            package(program, path, {OPERATORS: " ".join(sorted(called))}, freezing=on_cpu)
        return path

    def load(
        self, path: Path, example: Tensor, *, precision: str = "float32", threads: int | None = None
    ) -> Runner:
        """Load a package; see `FileEngine.load`."""
        from torch._inductor import aoti_load_package  # on use: it takes seconds to import

        threads = self._check(example, precision, threads)
        network = aoti_load_package(str(path))
        for operators in named_operators(network.get_metadata().get(OPERATORS, "").split()):
            operators.ready()
        last = example.is_contiguous(memory_format=torch.channels_last)
        form = torch.channels_last if last and not example.is_contiguous() else torch.contiguous_format

        # The code takes the strides of its example for granted.
        def call(images: Tensor) -> object:
            return network(images.contiguous(memory_format=form))

        return torch_runner(call, Expected(example, precision), precision, threads)
