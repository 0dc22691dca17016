"""Values of one forward, without keeping anything on a module.

Two tools for methods whose parts share something while an image passes through:

- *Along the feature maps.* `thread` hangs a value on a feature map, `threaded` reads it
  further on. It lives as long as the feature map does, so copies of a network, threads,
  gradient checkpointing, `torch.compile` and `torch.export` are safe. Modules that make
  a new tensor lose it, unless `pass_along` told them not to.
- *Into a block.* `Bound` runs a block's own forward with some of its layers called in
  another way (with a routing, say), so that no family's forward is written twice.

Shapes: x, any feature map; the values are whatever a method threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import MethodType
from typing import Any, TypeGuard

from torch import Tensor, nn
from torch.utils.hooks import BackwardHook

Call = Callable[[str, nn.Module, Any], Any]


def thread(x: Tensor, name: str, value: Any) -> Tensor:
    """Hang `value` on the feature map `x`, which is returned, under a method's `name`."""
    setattr(x, f"_pliant_{name}", value)
    return x


def threaded(x: Tensor, name: str) -> Any:
    """What `thread` hung on `x` under `name`; None where nothing was, or it was lost.

    Example:
        >>> import torch
        >>> x = thread(torch.zeros(1), "routing", torch.ones(2))
        >>> threaded(x, "routing"), threaded(x + 1, "routing")
        (tensor([1., 1.]), None)
    """
    return getattr(x, f"_pliant_{name}", None)


def arrived(x: Tensor, name: str) -> Any:
    """What `thread` hung on `x` under `name`.

    Raises:
        RuntimeError: nothing, or it was lost.

    Example:
        >>> import torch
        >>> arrived(thread(torch.zeros(1), "routing", torch.ones(2)), "routing")
        tensor([1., 1.])
    """
    value = threaded(x, name)
    if value is None:
        raise RuntimeError(
            f"no {name} came with the feature map: the block that computes it did not run before, or "
            f"a module between made a new tensor (reentrant gradient checkpointing and full backward hooks "
            f"on blocks do too: put such hooks on the layers inside the blocks)"
        )
    return value


def pass_along(modules: Iterable[nn.Module], name: str) -> None:
    """Let modules hang what their input carries under `name` on their output.

    An output that carries a value of its own keeps it.

    Example:
        >>> import torch
        >>> pool = nn.AvgPool2d(2)
        >>> pass_along([pool], "routing")
        >>> threaded(pool(thread(torch.zeros(1, 1, 2, 2), "routing", torch.ones(2))), "routing")
        tensor([1., 1.])
    """
    for module in modules:
        module.register_forward_hook(partial(_hand_on, name))


def passes_along(hook: object) -> TypeGuard[partial[Any]]:
    """Whether a forward hook is one that `pass_along` put on a module.

    Example:
        >>> pool = nn.AvgPool2d(2)
        >>> pass_along([pool], "routing")
        >>> [passes_along(hook) for hook in pool._forward_hooks.values()], passes_along(print)
        ([True], False)
    """
    return isinstance(hook, partial) and hook.func is _hand_on


def take_over(new: nn.Module, old: nn.Module) -> None:
    """Let `new`, which takes the place of `old`, pass along what `old` does.

    Example:
        >>> import torch
        >>> old, new = nn.AvgPool2d(2), nn.MaxPool2d(2)
        >>> pass_along([old], "routing")
        >>> take_over(new, old)
        >>> take_over(new, old)  # which changes nothing
        >>> [hook.args for hook in new._forward_hooks.values()]
        [('routing',)]
    """
    known = {hook.args for hook in _passing(new)}
    for hook in _passing(old):
        if hook.args not in known:
            new.register_forward_hook(hook)


def borrowed(model: nn.Module) -> list[tuple[str, str, str]]:
    """Which modules of a network use a value that another one computed and threaded.

    A module tells by its attributes: ``gives``, the name of a value that it computes, and
    ``takes``, the name of one that it reads off its input.

    Returns:
        For each module that reads one: name of the value, path of the module that computes it
        (the last one before), path of the module that reads it.

    Example:
        >>> import timm, pliant
        >>> single = pliant.CondConv(experts=2, routing="single", begin=8, classifier=False)
        >>> borrowed(pliant.convert(timm.create_model("resnet18"), single))
        [('routing', 'layer4.0.router', 'layer4.1.router')]
    """
    found: list[tuple[str, str, str]] = []
    sources: dict[str, str] = {}
    for path, module in model.named_modules():
        if name := getattr(module, "takes", ""):
            found.append((name, sources.get(name, ""), path))
        elif name := getattr(module, "gives", ""):
            sources[name] = path
    return found


def _passing(module: nn.Module) -> list[partial[Any]]:
    return [hook for hook in module._forward_hooks.values() if passes_along(hook)]


def _hand_on(name: str, _module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
        value = threaded(args[0], name)
        if value is not None and threaded(output, name) is None:
            thread(output, name, value)


class Bound:
    """A view of a module in whose forward some of its submodules are called otherwise.

    Everything but these is the module's own. The view is made for one forward and thrown
    away after it. Hooks run as they do without the view, but for those of `register_backward_hook`, which
    PyTorch has deprecated.

    Args:
        module: whose forward runs.
        leaves: dotted paths, in `module`, of the layers that are called otherwise.
        between: dotted paths of the modules on the way to them (`between`).
        call: gets path, layer and input of such a call, and gives its output.

    Example:
        >>> import torch
        >>> block = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Identity()))
        >>> leaves = frozenset({"1.0"})
        >>> double = Bound(block, leaves, between(leaves), lambda path, layer, x: 2 * layer(x))
        >>> double(torch.tensor([-1.0, 3.0]))
        tensor([0., 6.])
    """

    def __init__(
        self,
        module: nn.Module | Bound,
        leaves: frozenset[str],
        between: frozenset[str],
        call: Call,
        prefix: str = "",
    ) -> None:
        # Names that no module has: those of the module are looked up through the view.
        self._bound = module
        self._bound_leaves = leaves
        self._bound_between = between
        self._bound_call = call
        self._bound_prefix = prefix

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_bound"):
            raise AttributeError(name)  # a compiler looks at the view before it is made
        value = getattr(self._bound, name)
        path = self._bound_prefix + name
        if path in self._bound_leaves:
            return partial(self._bound_call, path, value)
        if path in self._bound_between:
            return Bound(value, self._bound_leaves, self._bound_between, self._bound_call, f"{path}.")
        if isinstance(value, MethodType) and value.__self__ is self._bound:
            return MethodType(value.__func__, self)  # what it calls is bound too
        return value

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """That of the module: a forward of a subclass may call that of its base by `super()`."""
        return type(self._innermost()) if "_bound" in self.__dict__ else Bound

    def __iter__(self) -> Iterator[Any]:
        """The children, as `nn.Sequential` runs them."""
        for name, _ in self._bound.named_children():
            yield self.__getattr__(name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        """The module's forward, through this view."""
        module = self._innermost()
        forward = partial(type(module).forward, self)
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        ):
            return _with_hooks(module, forward, args, options)
        return forward(*args, **options)

    def _innermost(self) -> nn.Module:
        module = self._bound
        while isinstance(module, Bound):  # a view of a view: of two methods in one block
            module = module._bound
        return module


def _with_hooks(
    module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]
) -> Any:
    """What a call of `module` with its hooks gives, if its forward is `forward`.

    As `nn.Module._call_impl` does; that calls the forward of the module that it hands to the hooks.
    """
    for key, hook in module._forward_pre_hooks.items():
        if key in module._forward_pre_hooks_with_kwargs:
            args, options = hook(module, args, options) or (args, options)
        else:
            new = hook(module, args)
            args = args if new is None else new if isinstance(new, tuple) else (new,)
    hooks: Any = module  # PyTorch's getters have no types
    full, before = hooks._get_backward_hooks()[0], hooks._get_backward_pre_hooks()
    backward: Any = BackwardHook(module, full, before) if full or before else None
    if backward is not None:
        args = backward.setup_input_hook(args)
    output = forward(*args, **options)
    for key, hook in module._forward_hooks.items():
        given = (args, options) if key in module._forward_hooks_with_kwargs else (args,)
        new = hook(module, *given, output)
        output = output if new is None else new
    return output if backward is None else backward.setup_output_hook(output)


def between(leaves: Iterable[str]) -> frozenset[str]:
    """The paths of all modules on the way to `leaves`.

    Example:
        >>> sorted(between({"mlp.fc1", "conv", "a.b.c"}))
        ['a', 'a.b', 'mlp']
    """
    parts = (path.split(".") for path in leaves)
    return frozenset(".".join(p[:n]) for p in parts for n in range(1, len(p)))
