"""A network made ready to run fast in PyTorch, its function unchanged: `optimize`.

Shapes: `example` [B, C, H, W], whatever the network takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pliant.deploy.folding import Watching, fold_norms
from pliant.parts import Network, Part, hooked, named_operators, parts, replace_parts


def optimize(model: Network, example: Tensor, *, fused: bool = True, channels_last: bool = True) -> Network:
    """A copy for inference: norms folded, channels_last, parts of methods in their fast form.

    It runs in eager mode, under `torch.compile` and through `torch.export`. A fast form with a
    native operator (the fused Mixture-of-Depths block) is built by the machine's C++ compiler on
    first use, in a minute or two, and kept; where that fails, a warning says why and the form
    runs in PyTorch's operators.

    Args:
        model: any network; it stays as it is.
        example: an input to watch one forward of, on the network's device.
        fused: replace parts by their fast forms. `unfused` names those that have none. What
            comes out of the others is channels_last.
        channels_last: lay all weights out with their channels last, as convolutions on CPUs
            and tensor cores want them. Give images in the same layout.

    Returns:
        The copy, in evaluation mode, its parameters without gradients. It is to be run or
        exported, not to be trained or saved: save `model`.

    Example:
        >>> import timm, torch
        >>> model = timm.create_model("resnet20_cifar_mod").eval()
        >>> x = torch.randn(1, 3, 32, 32)
        >>> ready = optimize(model, x)
        >>> unfused(ready)
        {}
        >>> bool(torch.allclose(ready(x), model(x), rtol=1e-3, atol=1e-4))
        True
    """
    network = fold_norms(model, example).requires_grad_(False)
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
        if example.dim() == 4:
            example = example.contiguous(memory_format=torch.channels_last)
    if not fused:
        return network
    operators: set[str] = set()

    def fast(_path: str, part: Part) -> nn.Module | None:
        form = None if hooked(part) else part.fast_form()
        if not isinstance(form, nn.Module):
            return None
        operators.add(part.operators)
        return form

    network = replace_parts(network, fast)
    if example.device.type == "cpu":
        for native in named_operators(operators):
            native.ready()
    _change_in_place(network, example)
    return network


def unfused(model: nn.Module) -> dict[str, str]:
    """Paths of the parts that are not in their fast form, and why they cannot be.

    The reason is empty for those that `optimize` would replace, once their norms are folded. Parts
    of a kind that has no fast form are not named.

    Example:
        >>> import timm
        >>> model = timm.create_model("resnet18_cifar_mod", selection="first", stages=(0,))
        >>> unfused(optimize(model, torch.randn(1, 3, 32, 32)))
        {'layer1.1': 'its channels are not chosen by a learned selector'}
    """
    found = {}
    for path, part in parts(model).items():
        form = part.fast_form()
        if form is not None:
            found[path] = hooked(part) or (form if isinstance(form, str) else "")
    return found


def _change_in_place(network: nn.Module, example: Tensor) -> None:
    """Let those fast forms work in place whose input nobody reads after them."""
    found = parts(network).values()
    if any(p.switches for p in found) or all(p.inplace is None for p in found):
        return  # another forward may have other readers than this one
    readers = _Readers()
    readers.later.update(_storage(t) for t in (example, *network.parameters(), *network.buffers()))
    readers.watch(network, example)
    for part, storages in readers.inputs.items():
        part.inplace = not any(storage in readers.later for storage in storages)


class _Readers(Watching):
    """Who reads the inputs of parts that can work in place in one forward, these parts aside.

    Attributes:
        inputs: the memory that each part got, by its address.
        later: memory that is read after a part got it, or that is not the network's own.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inputs: dict[Part, list[int]] = {}
        self.later: set[int] = set()
        self._kept: list[Tensor] = []  # so that nobody else gets that memory
        self._got: set[int] = set()
        self._inside = False

    def read(self, tensor: Tensor) -> None:
        if not self._inside and (storage := _storage(tensor)) in self._got:
            self.later.add(storage)

    def hooks(self, network: nn.Module) -> Iterator[RemovableHandle]:
        for part in (p for p in parts(network).values() if p.inplace is not None):
            self.inputs[part] = []
            yield part.register_forward_pre_hook(self._before)
            yield part.register_forward_hook(self._behind)

    def _before(self, part: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(part, Part)
        self.read(args[0])
        self._kept.append(args[0])
        self._got.add(_storage(args[0]))
        self.inputs[part].append(_storage(args[0]))
        self._inside = True

    def _behind(self, _part: nn.Module, _args: Any, _output: Any) -> None:
        self._inside = False


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
