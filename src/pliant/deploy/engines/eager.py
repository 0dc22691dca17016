"""PyTorch as it is."""

from __future__ import annotations

from torch import Tensor, nn

from pliant.deploy.engines.base import Engine, Expected, Runner, evaluated, torch_runner


class Eager(Engine):
    """PyTorch's own operators, one after another.

    In bfloat16, weights and images are (``model.to(torch.bfloat16)``), rather than that
    autocast would convert weights in each forward.

    Example:
        >>> import torch
        >>> run = Eager().prepare(nn.Conv2d(3, 8, 3), torch.randn(1, 3, 8, 8))
        >>> run(torch.randn(1, 3, 8, 8)).shape
        torch.Size([1, 8, 6, 6])
    """

    name = "eager"

    def _prepare(self, model: nn.Module, example: Tensor, precision: str, threads: int) -> Runner:
        expected = Expected(example, precision, any_batch=True)
        return torch_runner(evaluated(model, precision), expected, precision, threads)
