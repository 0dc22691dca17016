"""A network made ready to run fast in PyTorch, its function unchanged: `optimize`.

Shapes: `example` [B, C, H, W], whatever the network takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from pliant.deploy.folding import fold_norms
from pliant.methods.adaptive_depth.switch import Depth
from pliant.methods.mixture_of_depths import MoDBlock
from pliant.methods.mixture_of_depths.ops import building
from pliant.methods.mixture_of_depths.ops.fused import FusedMoDBlock, fusable
from pliant.threaded import passes_along, take_over

Network = TypeVar("Network", bound=nn.Module)


def optimize(model: Network, example: Tensor, *, fused: bool = True, channels_last: bool = True) -> Network:
    """A copy for inference: norms folded, channels_last, Mixture-of-Depths blocks fused.

    It runs in eager mode, under `torch.compile` and through `torch.export`. The fused block
    is built by the machine's C++ compiler on first use, in a minute or two, and kept; where
    that fails, a warning says why and the block runs in PyTorch's operators.

    Args:
        model: any network; it stays as it is.
        example: an input to watch one forward of, on the network's device.
        fused: replace Mixture-of-Depths blocks by `FusedMoDBlock`. `unfused` names those
            that have no such form. What comes out of the others is channels_last.
        channels_last: lay all weights out with their channels last, as convolutions on CPUs
            and tensor cores want them. Give images in the same layout.

    Returns:
        The copy, in evaluation mode, its parameters without gradients. It is to be run or
        exported, not to be trained or saved: save `model`.

    Example:
        >>> import timm, torch
        >>> model = timm.create_model("resnet50_mod").eval()
        >>> x = torch.randn(1, 3, 64, 64)
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
    if fused and (blocks := _blocks(network)):
        if example.device.type == "cpu":
            building.ready()
        for path, block in blocks.items():
            if not _why_not(block):
                network = _put(network, path, block)
        _change_in_place(network, example)
    return network


def unfused(model: nn.Module) -> dict[str, str]:
    """Paths of the Mixture-of-Depths blocks that are not fused, and why they cannot be.

    The reason is empty for those that `optimize` would fuse, once their norms are folded.

    Example:
        >>> import timm
        >>> model = timm.create_model("resnet18_cifar_mod", selection="first", stages=(0,))
        >>> unfused(optimize(model, torch.randn(1, 3, 32, 32)))
        {'layer1.1': 'its channels are not chosen by a learned selector'}
    """
    return {path: _why_not(block) for path, block in _blocks(model).items()}


def _blocks(model: nn.Module) -> dict[str, MoDBlock]:
    return {path: m for path, m in model.named_modules() if isinstance(m, MoDBlock)}


def _why_not(block: MoDBlock) -> str:
    parts = [*block.modules()]
    hooks = [h for m in parts for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    if not all(passes_along(hook) for hook in hooks):
        return "it has hooks, which a fused block would not run"
    return fusable(block)


def _put(network: Network, path: str, block: MoDBlock) -> Network:
    """Put the fused form of `block` in its place; returns the network."""
    new = FusedMoDBlock(block).eval()
    take_over(new, block)
    if not path:
        return cast("Network", new)  # the network is this one block
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, new)
    return network


def _change_in_place(network: nn.Module, example: Tensor) -> None:
    """Let those fused blocks work in place whose input nobody reads after them."""
    if any(isinstance(m, Depth) for m in network.modules()):
        return  # another depth may have other readers than this forward
    readers = _Readers()
    readers.later.update(_storage(t) for t in (example, *network.parameters(), *network.buffers()))
    gpus = [example.device] if example.device.type == "cuda" else []
    with torch.random.fork_rng(gpus), torch.no_grad(), readers.around(network), readers:
        output = network(example)
    for tensor in tree_iter(output):
        if isinstance(tensor, Tensor):
            readers.read(tensor)
    for block, storages in readers.inputs.items():
        block.inplace = not any(storage in readers.later for storage in storages)


class _Readers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Who reads the inputs of fused blocks in one forward, these blocks aside.

    Attributes:
        inputs: the memory that each block got, by its address.
        later: memory that is read after a block got it, or that is not the network's own.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inputs: dict[FusedMoDBlock, list[int]] = {}
        self.later: set[int] = set()
        self._kept: list[Tensor] = []  # so that nobody else gets that memory
        self._got: set[int] = set()
        self._inside = False

    def read(self, tensor: Tensor) -> None:
        """Note that `tensor` is read, if a block got its memory before."""
        if (storage := _storage(tensor)) in self._got:
            self.later.add(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note what an operation outside of the blocks reads, and let it run."""
        if not self._inside:
            for tensor in tree_iter((args, kwargs)):
                if isinstance(tensor, Tensor):
                    self.read(tensor)
        return func(*args, **(kwargs or {}))

    @contextmanager
    def around(self, network: nn.Module) -> Iterator[None]:
        """Hooks before and behind the fused blocks."""
        handles = []
        for block in (m for m in network.modules() if isinstance(m, FusedMoDBlock)):
            self.inputs[block] = []
            handles.append(block.register_forward_pre_hook(self._before))
            handles.append(block.register_forward_hook(self._behind))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(block, FusedMoDBlock)
        self.read(args[0])
        self._kept.append(args[0])
        self._got.add(_storage(args[0]))
        self.inputs[block].append(_storage(args[0]))
        self._inside = True

    def _behind(self, _block: nn.Module, _args: Any, _output: Any) -> None:
        self._inside = False


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
