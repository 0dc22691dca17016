"""`torch.compile`: for deployment with weights frozen, or as it comes."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from pliant.compiling import room_to_compile, torch_threads
from pliant.deploy.engines.base import Engine, Expected, Runner, evaluated, torch_runner


class Compile(Engine):
    """Code that `torch.compile` makes for one shape of input; on a GPU with CUDA graphs.

    `prepare` compiles by running its example twice. Precision as for `Eager`: that of weights and
    images.

    Args:
        name: name of the engine.
        freeze: let weights be constants of the code (on a CPU: they are laid out anew for
            the operators). The network must not change afterwards.

    Example:
        >>> Compile().unfit("cpu", "bfloat16")
        ''
    """

    def __init__(self, name: str = "compile", freeze: bool = True) -> None:
        self.name, self.freeze = name, freeze

    def _prepare(self, model: nn.Module, example: Tensor, precision: str, threads: int) -> Runner:
        import torch._inductor.config

        on_gpu = example.device.type == "cuda"
        options: dict[str, Any] = {"mode": "reduce-overhead"} if on_gpu else {}
        # Networks that share a forward share its cache of compiled code as well, which is
        # searched at each call. Newer versions of PyTorch can part them.
        if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
            options["isolate_recompiles"] = True
        compiled = torch.compile(evaluated(model, precision), dynamic=False, **options)
        run = torch_runner(compiled, Expected(example, precision), precision, threads)
        # Freezing is read when code is made, not when torch.compile is called; and the
        # number of threads is in that code.
        with (
            torch._inductor.config.patch(freezing=self.freeze and not on_gpu),
            room_to_compile(),
            torch_threads(threads),
        ):
            for _ in range(2):
                run(example)
        return run
