"""The Mixture-of-Depths block as one operator, `FusedMoDBlock`, and which blocks have it, `fusable`.

Shapes in this file: those of `pliant.methods.mixture_of_depths.ops.mod_block`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from pliant.anatomy import Block
from pliant.methods.mixture_of_depths.ops.mod_block import in_pytorch, mod_block_
from pliant.methods.mixture_of_depths.selectors import ChannelSelector
from pliant.parts import OnnxOperator, as_defined

if TYPE_CHECKING:  # the block itself asks for this form
    from pliant.methods.mixture_of_depths.block import MoDBlock

_NATIVE = (torch.float32, torch.bfloat16)
_SILENT = (nn.Identity, nn.Dropout, nn.Dropout2d)


class FusedMoDBlock(Block):
    """A Mixture-of-Depths block for inference, in one operator.

    It computes the function of the block that it is made from, for any memory format; its output is
    channels_last. Where a gradient is wanted, or the operator does not know the dtype or the
    device, it runs in PyTorch's operators.

    Args:
        block: a block for which `fusable` is empty, its batch norms folded
            (`pliant.deploy.folding.fold_norms`).
        inplace: change the input instead of a copy, which is right if nobody else reads it.

    Attributes:
        k: number of channels that are processed.
        order: ``"score"`` or ``"index"``.
        fusion: ``"first"``, ``"last"``, ``"original"`` or ``"replace"``.
        dilation: of the 3x3 convolutions.
        down: this and all other parameters are the operator's arguments; see `in_pytorch`.

    Raises:
        ValueError: `block` has an option that the operator does not know.

    Example:
        >>> import timm
        >>> from pliant.deploy.folding import fold_norms
        >>> model = timm.create_model("resnet50_mod").eval()
        >>> x = torch.randn(1, 3, 64, 64)
        >>> block = FusedMoDBlock(fold_norms(model, x).layer1[1])
        >>> y = torch.randn(1, 256, 16, 16)
        >>> bool(torch.allclose(block(y), model.layer1[1](y), atol=1e-5))
        True
    """

    operators: ClassVar[str] = "pliant.methods.mixture_of_depths.ops.building"
    inplace: bool
    weight3: nn.Parameter | None
    bias3: nn.Parameter | None

    def __init__(self, block: MoDBlock, *, inplace: bool = False) -> None:
        super().__init__(block.channels)
        if reason := fusable(block):
            raise ValueError(f"this block cannot be fused: {reason}")
        selector = cast("ChannelSelector", block.selector)
        convs = _convolutions(block.core)
        self.k, self.fusion, self.order = block.k, block.fusion, selector.order
        self.dilation = int(convs[1].dilation[0])
        self.inplace = inplace
        # The operator reads both matrices along their outputs.
        values = [selector.fc1.weight.t(), selector.fc2.weight.t()]
        for conv in convs:
            bias = conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias
            values += [conv.weight, bias]
        names = ("down", "up", "weight1", "bias1", "weight2", "bias2", "weight3", "bias3")
        for name, value in zip(names, values + [None] * (len(names) - len(values)), strict=True):
            fixed = None if value is None else nn.Parameter(value.detach().contiguous().clone(), False)
            self.register_parameter(name, fixed)

    def forward(self, x: Tensor) -> Tensor:
        """Process k channels of `x` [B, C, H, W]; the same shape and dtype come back."""
        weights: Any = self._parameters.values()
        arguments = (*weights, self.dilation, self.order, self.fusion)
        kept = torch.channels_last
        differentiable = torch.is_grad_enabled() and (x.requires_grad or self.down.requires_grad)
        if differentiable or x.dtype not in _NATIVE or x.dtype != self.down.dtype:
            x = x.clone(memory_format=kept)
            in_pytorch(x, *arguments)
            return x
        if x.is_cuda:  # Triton is imported only where there is a GPU
            from pliant.methods.mixture_of_depths.ops.triton_mod import mod_block

            how: Any = {"dilation": self.dilation, "order": self.order, "fusion": self.fusion}
            return mod_block(x, *weights, **how, inplace=self.inplace)
        x = x.contiguous(memory_format=kept) if self.inplace else x.clone(memory_format=kept)
        mod_block_(x, *arguments)
        return x

    def onnx_operator(self) -> OnnxOperator:
        """``pliant.MoDBlock`` of ``mod_block_ort.cpp``; see `Part.onnx_operator`."""
        attributes = ("dilation", "order", "fusion")
        return OnnxOperator(
            "MoDBlock",
            dict(self.named_parameters()),
            {name: getattr(self, name) for name in attributes},
            ranking="selector",
        )

    def extra_repr(self) -> str:
        """What `print` shows."""
        return (
            f"{super().extra_repr()}, k={self.k}, order={self.order!r}, fusion={self.fusion!r}, "
            f"dilation={self.dilation}, inplace={self.inplace}"
        )


def fusable(block: MoDBlock) -> str:
    """Why this block has no fused form; empty if it has one.

    Example:
        >>> import timm
        >>> fusable(timm.create_model("resnet18_mod", selection="random").layer1[1])
        'its channels are not chosen by a learned selector'
    """
    if not isinstance(block.selector, ChannelSelector):
        return "its channels are not chosen by a learned selector"
    if block.inner_shortcut:
        return "inner_shortcut adds the core's input to its output"
    if not isinstance(block.last_act, nn.Identity):
        return f"it ends with an activation ({type(block.last_act).__name__})"
    if not _does_nothing(block.drop_path):
        return f"{type(block.drop_path).__name__} follows its core"
    layers = [m for m in block.core.modules() if not next(m.children(), None) and not _does_nothing(m)]
    kinds = [type(m) for m in layers]
    if any(issubclass(kind, nn.modules.batchnorm._BatchNorm) for kind in kinds):
        return "its core has batch norms, which have to be folded first"
    convs = _convolutions(block.core)
    sizes = [conv.kernel_size for conv in convs]
    if sizes not in ([(1, 1), (3, 3), (1, 1)], [(3, 3), (3, 3)]):
        return f"its core has kernels of {sizes}, neither 1x1, 3x3, 1x1 nor 3x3 twice"
    if kinds != [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.Conv2d][: 2 * len(convs) - 1]:
        names = ", ".join(kind.__name__ for kind in kinds)
        return f"its core is {names}, not convolutions with ReLU between"
    for conv in convs:
        three = conv.kernel_size == (3, 3)
        dilation = convs[1].dilation if three else (1, 1)
        padding = dilation if three else (0, 0)
        plain = conv.groups == 1 and conv.stride == (1, 1) and conv.padding_mode == "zeros"
        if not plain or (conv.dilation, conv.padding) != (dilation, padding) or dilation[0] != dilation[1]:
            return f"its core has a convolution of another padding, dilation or stride: {conv}"
    linear = (block.selector.fc1, block.selector.fc2)
    if any(getattr(layer, "bias", None) is not None for layer in linear):
        return "a layer of its selector has a bias"
    for layer in (*linear, *convs):
        if not as_defined(layer, nn.Linear, nn.Conv2d):
            return f"a {type(layer).__name__} in it does more than its weights say, so it has to be called"
    return ""


def _convolutions(core: nn.Module) -> list[nn.Conv2d]:
    return [m for m in core.modules() if isinstance(m, nn.Conv2d)]


def _does_nothing(module: nn.Module) -> bool:
    """Whether a layer does nothing in evaluation: dropout of any kind."""
    return isinstance(module, _SILENT) or type(module).__name__ in ("DropBlock2d", "DropPath")
