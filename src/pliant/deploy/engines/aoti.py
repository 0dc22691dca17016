"""AOTInductor: the network as a package of machine code, without Python."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from pliant.deploy.engines.base import (
    PRECISIONS,
    Expected,
    FileEngine,
    Runner,
    evaluated,
    torch_runner,
    torch_threads,
)

OPERATORS = "pliant.operators"  # of a package: whether it calls pliant's own


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
    ) -> Path:
        """A ``.pt2`` package; see `FileEngine.write`."""
        import torch._inductor

        threads = self._check(example, precision, threads)
        network = evaluated(model, precision)
        path = folder / "network.pt2"
        with torch_threads(threads), torch.no_grad():
            program = torch.export.export(network, (example.to(PRECISIONS[precision]),))
            torch._inductor.aoti_compile_and_package(
                program,
                package_path=str(path),
                inductor_configs={
                    "freezing": example.device.type == "cpu",
                    "aot_inductor.metadata": {OPERATORS: str(_fused(network))},
                },
            )
        return path

    def load(
        self, path: Path, example: Tensor, *, precision: str = "float32", threads: int | None = None
    ) -> Runner:
        """Load a package; see `FileEngine.load`."""
        import torch._inductor

        threads = self._check(example, precision, threads)
        import pliant.methods.mixture_of_depths.ops.building as operators

        network = torch._inductor.aoti_load_package(str(path))
        if example.device.type == "cpu" and network.get_metadata().get(OPERATORS) == str(True):
            operators.ready()
        last = example.is_contiguous(memory_format=torch.channels_last)
        form = torch.channels_last if last and not example.is_contiguous() else torch.contiguous_format

        # The code takes the strides of its example for granted.
        def call(images: Tensor) -> object:
            return network(images.contiguous(memory_format=form))

        return torch_runner(call, Expected(example, precision), precision, threads)


def _fused(network: nn.Module) -> bool:
    from pliant.methods.mixture_of_depths.ops.fused import FusedMoDBlock

    return any(isinstance(m, FusedMoDBlock) for m in network.modules())
