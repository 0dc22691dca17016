"""Put the forms of layers that engines run well in the places of these layers: `use_export_forms`."""

from __future__ import annotations

from typing import Literal, TypeVar

from torch import nn

from pliant.methods.condconv.exported import OneImageConv
from pliant.methods.condconv.layers import CondConv2d
from pliant.methods.mixture_of_depths.block import MoDBlock
from pliant.methods.mixture_of_depths.exported import GraphMoD, ProgramMoD, refuse_random
from pliant.threaded import take_over

Network = TypeVar("Network", bound=nn.Module)
Target = Literal["program", "onnx", "openvino"]


def use_export_forms(model: Network, target: Target, batch: int | None) -> Network:
    """Put export forms in the places of layers, in `model` itself.

    Args:
        model: a network in evaluation mode, without norms in the cores of its
            Mixture-of-Depths blocks where those were folded.
        target: what runs the file.
        batch: images of each call; None: any number.

    Returns:
        `model`.

    Raises:
        ValueError: a Mixture-of-Depths block draws its channels at random.

    Example:
        >>> import timm
        >>> model = timm.create_model("resnet20_cifar_mod").eval()
        >>> x = torch.randn(2, 3, 32, 32)
        >>> expected = model(x)
        >>> torch.allclose(use_export_forms(model, "onnx", None)(x), expected, atol=1e-4)
        True
    """
    for path, module in list(model.named_modules()):
        new: nn.Module
        if isinstance(module, MoDBlock):
            refuse_random(path, module)
            new = ProgramMoD(module) if target == "program" else GraphMoD(module, batch)
        elif isinstance(module, CondConv2d) and batch == 1:
            new = OneImageConv(module)
        else:
            continue
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new.eval())
        take_over(new, module)
    return model
