"""Batch norms folded into the layers before them, in any network: `fold_norms`.

In evaluation a batch norm multiplies each channel by a number and adds one, which the
convolution before it can do itself: ``s (W x + b - m) + t = (s W) x + s (b - m) + t`` with
``s = weight / sqrt(var + eps)``. Frozen norms (torchvision's and timm's) are batch norms that always
do so. Which norms follow which convolutions is watched in one forward, so no family of networks has
to be known.

Parts of methods say themselves whether and how they take a norm up (`pliant.parts.Part.takes_norm`).

Shapes: O output channels of a layer; weights [O, ...]; a norm's tensors [O].
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from timm.layers.conv2d_same import Conv2dSame, Conv2dSameExport
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.hooks import RemovableHandle
from torchvision.ops.misc import FrozenBatchNorm2d

from pliant.parts import Network, Part, as_defined, hooked, parts
from pliant.threaded import take_over

# By exact type: a subclass may do something to its weight first (weight standardisation).
_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv2dSame, Conv2dSameExport, nn.Linear)
_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    BatchNormAct2d,
    FrozenBatchNorm2d,
    FrozenBatchNormAct2d,
)


def fold_norms(model: Network, example: Tensor) -> Network:
    """A copy for inference with batch norms folded into the layers before them.

    A norm goes if all that it reads is what one convolution or linear layer wrote, and
    nobody else reads that. It leaves an `nn.Identity`, or the activation that timm's norms
    carry. What stays as it is: norms after anything else, those that a part switches
    (`Part.switches`; the `subnet` of an adaptive network has plain ones), norms and layers
    that are used twice, and whatever the forward of `example` does not reach.

    Args:
        model: any network; it stays as it is.
        example: an input [B, ...] to watch one forward of.

    Returns:
        The copy, in evaluation mode: the same function, up to rounding. It is to be run or
        exported; its weights fit no other network, so save `model` instead.

    Example:
        >>> import timm
        >>> model = timm.create_model("resnet18").eval()
        >>> x = torch.randn(1, 3, 64, 64)
        >>> folded = fold_norms(model, x)
        >>> any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
        False
        >>> bool(torch.allclose(folded(x), model(x), atol=1e-4))
        True
    """
    folded = copy.deepcopy(model).eval()
    seen = _Seen()
    seen.watch(folded, example)
    paths = {module: path for path, module in folded.named_modules()}
    for norm, layer in _pairs(folded, seen):
        _fold(layer, norm)
        left = _what_is_left(norm)
        take_over(left, norm)
        folded.set_submodule(paths[norm], left.eval())
    return folded


class Watching(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches one forward: a subclass notes what is read, and by hooks what modules get and give."""

    def read(self, tensor: Tensor) -> None:
        """Note that an operation, or the caller, reads `tensor`."""
        raise NotImplementedError

    def hooks(self, network: nn.Module) -> Iterator[RemovableHandle]:
        """Set hooks, which are there for the time of the forward."""
        raise NotImplementedError

    def watch(self, network: nn.Module, example: Tensor) -> None:
        """Run `example` through; the caller's generators are left alone."""
        gpus = [example.device] if example.device.type == "cuda" else []
        handles = list(self.hooks(network))
        try:
            with torch.random.fork_rng(gpus), torch.no_grad(), self:
                output = network(example)
        finally:
            for handle in handles:
                handle.remove()
        self._read(output)

    def _read(self, values: Any) -> None:
        for tensor in {id(t): t for t in tree_iter(values) if isinstance(t, Tensor)}.values():
            self.read(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note which tensors an operation reads, and let it run."""
        self._read((args, kwargs))
        return func(*args, **(kwargs or {}))


class _Seen(Watching):
    """What layers and norms got and gave.

    Attributes:
        layers: each call of a layer that could take a norm up: it, what it wrote, and the
            version of that (which counts the operations in place).
        norms: each call of a norm: it, what it read, and its version.
        readers: operations that read a tensor, by its id.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers: list[tuple[nn.Module, Tensor, int]] = []
        self.norms: list[tuple[nn.Module, Tensor, int]] = []
        self.readers: Counter[int] = Counter()

    def read(self, tensor: Tensor) -> None:
        self.readers[id(tensor)] += 1

    def hooks(self, network: nn.Module) -> Iterator[RemovableHandle]:
        for module in network.modules():
            part = isinstance(module, Part) and not (hooked(module) or is_parametrized(module))
            if part or as_defined(module, *_PLAIN):  # what hooks do to inputs and outputs is not known
                yield module.register_forward_hook(self._after_layer)
            elif as_defined(module, *_NORMS):
                yield module.register_forward_pre_hook(self._before_norm)

    def _after_layer(self, module: nn.Module, _args: Any, output: Any) -> None:
        """Keeps the output, so that no other tensor gets its id."""
        if isinstance(output, Tensor) and not (isinstance(module, Part) and not module.takes_norm(output)):
            self.readers[id(output)] = 0
            self.layers.append((module, output, output._version))

    def _before_norm(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            self.norms.append((module, args[0], args[0]._version))


def _pairs(model: nn.Module, seen: _Seen) -> list[tuple[nn.Module, nn.Module]]:
    """Each norm that can go, with the layer before it."""
    calls = Counter(id(module) for module, _, _ in (*seen.layers, *seen.norms))
    places = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    owners = Counter(id(p) for m in set(model.modules()) for p in m._parameters.values() if p is not None)
    switched = {id(m) for part in parts(model).values() if part.switches for m in part.modules()}
    # By what they wrote; of layers that wrote one tensor (they call each other) none is right.
    written = Counter(id(tensor) for _, tensor, _ in seen.layers)
    writer = {id(t): (m, version) for m, t, version in seen.layers if written[id(t)] == 1}
    found = []
    for norm, read, version in seen.norms:
        layer, as_written = writer.get(id(read), (None, None))
        if (
            layer is not None
            and as_written == version
            and seen.readers[id(read)] == 1
            and calls[id(layer)] == calls[id(norm)] == 1
            and places[id(layer)] == places[id(norm)] == 1
            and all(owners[id(p)] == 1 for p in layer.parameters())
            and id(norm) not in switched
            and norm.running_mean is not None
            and norm.running_var is not None
            # A linear layer works on the last dimension, a norm on the second.
            and (read.dim() == 2 or not isinstance(layer, nn.Linear))
        ):
            found.append((norm, layer))
    return found


def _fold(layer: Any, norm: Any) -> None:
    """Give `layer` the weight and the bias that make `norm` superfluous."""

    def wide(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.detach().double()

    mean, var = wide(norm.running_mean), wide(norm.running_var)
    after = (mean, var, norm.eps, wide(norm.weight), wide(norm.bias))
    if isinstance(layer, Part):
        # Of a weight of one and no bias, what is left is the norm's own scale and shift.
        scale, shift = fuse_conv_bn_weights(torch.ones_like(mean)[:, None], None, *after)
        layer.take_norm(scale.detach()[:, 0], shift.detach())
        return
    weight, bias = fuse_conv_bn_weights(wide(layer.weight), wide(layer.bias), *after)
    for name, wide_value in (("weight", weight), ("bias", bias)):
        value = wide_value.detach().to(layer.weight.dtype)
        setattr(layer, name, nn.Parameter(value, requires_grad=layer.weight.requires_grad))


def _what_is_left(norm: nn.Module) -> nn.Module:
    if not isinstance(norm, BatchNormAct2d | FrozenBatchNormAct2d):
        return nn.Identity()
    parts = [m for m in (norm.drop, norm.act) if not isinstance(m, nn.Identity)]
    return parts[0] if len(parts) == 1 else nn.Sequential(*parts)
