"""The norms of a block: which depth may choose, and one that learns in place of a frozen one.

Shapes: none; these functions look at modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from timm import layers
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from pliant.anatomy import count_layers
from pliant.parts import copied

_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    layers.RmsNorm,
    layers.RmsNormFp32,
    layers.RmsNorm2d,
    layers.RmsNorm2dFp32,
    layers.SimpleNorm,
    layers.SimpleNormFp32,
    layers.SimpleNorm2d,
    layers.SimpleNorm2dFp32,
    layers.FrozenBatchNormAct2d,
    FrozenBatchNorm2d,
)


def norms(block: nn.Module) -> list[str]:
    """Paths of the norms on a block's main path: those of its shortcut are left out.

    Example:
        >>> import timm
        >>> norms(timm.create_model("resnet18").layer2[0])
        ['bn1', 'bn2']
    """
    return [path for path, module in _main_path(block) if isinstance(module, _NORMS)]


def unknown_norms(block: nn.Module) -> list[str]:
    """Paths of what is called a norm on a block's main path and is none that `norms` knows.

    Example:
        >>> import timm
        >>> model = timm.create_model("resnet18", norm_layer=timm.layers.FilterResponseNormTlu2d)
        >>> unknown_norms(model.layer1[0])
        ['bn1', 'bn2']
    """
    return [
        path
        for path, module in _main_path(block)
        if "norm" in type(module).__name__.lower()
        and not isinstance(module, _NORMS)
        and any(True for _ in module.parameters())
        and not count_layers(module)
    ]


def _main_path(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in block.named_modules():
        if not {"downsample", "shortcut"} & set(path.split(".")):
            yield path, module


def learnable_norm(norm: nn.Module) -> nn.Module:
    """A copy of a norm that learns, also of one that was frozen for good (`timm.utils.freeze`).

    Example:
        >>> frozen = layers.freeze_batch_norm_2d(nn.BatchNorm2d(8))
        >>> type(frozen).__name__, type(learnable_norm(frozen)).__name__
        ('FrozenBatchNorm2d', 'BatchNorm2d')
    """
    new: Any = copied(norm)
    if isinstance(norm, (layers.FrozenBatchNormAct2d, FrozenBatchNorm2d)):
        acts = isinstance(norm, layers.FrozenBatchNormAct2d)
        frozen, cls = new, layers.BatchNormAct2d if acts else nn.BatchNorm2d
        new = cls(len(norm.weight), eps=norm.eps).to(norm.weight)
        if acts:
            new.drop, new.act = frozen.drop, frozen.act
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(new, name).data = getattr(frozen, name)
    learnable: nn.Module = new.requires_grad_(True)
    return learnable
