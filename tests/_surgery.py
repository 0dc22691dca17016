"""What tests of surgery share: narrow networks, and a toy method whose blocks share a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import timm
import torch
from torch import nn

from pliant import MixtureOfDepths, convert
from pliant.anatomy import Block, stages
from pliant.method import Method, PassedOver, Site, Survey
from pliant.threaded import thread, threaded

SELECTIONS = ("learned", "random", "fixed", "first", "none")
NARROW = {"channels": (16, 32, 64, 128)}


def small(name="resnet18_cifar", **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **NARROW, **kwargs).eval()


def converted(selection="learned", **options) -> nn.Module:
    """A narrow network with one Mixture-of-Depths block in each stage."""
    return convert(small(), MixtureOfDepths(c=4, reduction=4, selection=selection, **options))


def snapshot(model):
    """Everything that a surgery could change: types, weights by identity and value, modes."""
    return (
        {name: (id(m), type(m), m.training) for name, m in model.named_modules()},
        {name: (id(p), p.detach().clone()) for name, p in model.state_dict(keep_vars=True).items()},
        sorted(vars(model)),
    )


def assert_untouched(model, before):
    now = snapshot(model)
    assert now[0] == before[0]
    assert now[2] == before[2]
    assert now[1].keys() == before[1].keys()
    for name, (identity, value) in now[1].items():
        assert identity == before[1][name][0]
        assert torch.equal(value, before[1][name][1])


class Counted(Block):
    """A block that passes on what the first of them saw."""

    def __init__(self, block: nn.Module, channels: int) -> None:
        super().__init__(channels)
        self.block = block

    def forward(self, x):
        value = threaded(x, "mean")
        value = x.mean() if value is None else value
        return thread(self.block(x) + value, "mean", value)


class Run(nn.Sequential):
    """What a stage becomes."""


@dataclass(frozen=True, kw_only=True)
class ShareTheMean(Method):
    """Thread a value along all blocks; the sites are runs of blocks."""

    wraps: ClassVar[bool] = True
    stages: tuple[int, ...] | None = None

    def survey(self, model: nn.Module) -> Survey:
        found = list(enumerate(stages(model)))
        return Survey(
            tuple(
                Site(s.path, {"blocks": len(s.blocks)})
                for n, s in found
                if not self.stages or n in self.stages
            ),
            tuple(
                PassedOver(s.path, "not asked for")
                for n, s in found
                if self.stages and n not in self.stages
            ),
        )

    def replace(self, module: nn.Module, site: Site) -> nn.Module:
        run = Run()
        for name, block in module.named_children():
            run.add_module(name, Counted(block, 0))
        return run
