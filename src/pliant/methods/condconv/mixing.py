"""A convolution whose kernel is mixed for each example: two forms of one function.

*Fused* mixes the kernels and convolves once for each example; *experts* convolves with
every expert and mixes the outputs (section 3 and figure 1 of arXiv 1904.04971).

Shapes in this file::

    B  batch                 x        [B, C, H, W]       feature map
    E  experts               weight   [E, O, C/g, h, w]  experts' kernels
    C  channels in           routing  [B, E] or [B, E, O]
    O  channels out          bias     [O] or [E, O]
    g  groups                result   [B, O, H', W'], in the memory format of x
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value

Form = Literal["auto", "fused", "experts"]

ROUTING = "routing"  # the name under which routings are threaded

# Values of a kernel from which a CPU convolves examples one by one: as groups of one
# convolution, large kernels take two to three times as long.
LARGE = 2**18
# Blocks of a kernel that are summed apart where few experts are read, so that threads share them.
BLOCKS = 16
# Values of the kernels that are mixed at a time for inference on a CPU. Beyond 32 MiB
# glibc returns a buffer to the system after each use, and getting it anew costs more than
# the mixing.
AT_ONCE = 2**21

# Positions of a convolution that cost what mixing and loading its kernel for one example
# does (`faster_form`).
MIXING_WORTH = {"1x1": 16, "larger": 32}
# How that grows with the batch. Beyond 1x1, fused kernels are convolved example by example or
# as groups, and gain less from a batch than one convolution with all experts.
BATCH_POWER = {"1x1": 0.0, "larger": 0.25}


class Geometry(NamedTuple):
    """What a convolution does beside its weights."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def output_size(self, height: int, width: int, kernel: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the output.

        Example:
            >>> Geometry(stride=(2, 2), padding=(1, 1)).output_size(14, 9, (3, 3))
            (7, 5)
        """
        along = zip((height, width), kernel, self.stride, self.padding, self.dilation, strict=True)
        rows, columns = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in along)
        return rows, columns


def mix(experts: Tensor, routing: Tensor, active: int | None = None) -> Tensor:
    """The experts' values summed with each example's weights.

    Args:
        experts: [E, O, ...].
        routing: [B, E], or [B, E, O] with a weight for each output channel.
        active: experts of an example whose weights are not zero, at most (hard routing). Of few
            examples, only these experts are read. None: all.

    Returns:
        [B, O, ...].

    Example:
        >>> mix(torch.tensor([[1.0, 2.0], [10.0, 20.0]]), torch.tensor([[0.5, 1.0]]))
        tensor([[10.5000, 21.0000]])
    """
    routing = routing.to(experts.dtype)
    if active is not None and _reads_few(experts, routing.shape[0], active):
        return _mix_few(experts, routing, active)
    if routing.dim() == 2:
        mixed = routing @ experts.flatten(1)
    else:  # a product for each channel: [O, B, E] @ [O, E, P]
        flat = experts.reshape(*experts.shape[:2], -1)
        mixed = torch.bmm(routing.permute(2, 0, 1), flat.transpose(0, 1)).transpose(0, 1)
    return mixed.reshape(routing.shape[0], *experts.shape[1:])


def mix_of_one(experts: Tensor, routing: Tensor, active: int) -> Tensor:
    """As `mix`, of one example: a graph that gathers the `active` experts and reads no others.

    Args:
        experts: [E, O, ...].
        routing: [E] or [E, O].
        active: experts whose weights are not zero, at most.

    Returns:
        [O, ...].

    Example:
        >>> mix_of_one(torch.tensor([[1.0, 2.0], [10.0, 20.0]]), torch.tensor([0.0, 0.5]), 1)
        tensor([ 5., 10.])
    """
    shares, chosen = routing.to(experts.dtype).topk(active, dim=0)
    if routing.dim() == 1:
        mixed = shares[None] @ experts.index_select(0, chosen).flatten(1)
        return mixed.reshape(experts.shape[1:])
    out = experts.shape[1]
    rows = (chosen * out + torch.arange(out, device=chosen.device)).flatten()
    gathered = experts.flatten(0, 1).index_select(0, rows).reshape(active, out, -1)
    return (gathered * shares[:, :, None]).sum(0).reshape(experts.shape[1:])


def _reads_few(experts: Tensor, batch: int, active: int) -> bool:
    """Whether reading each example's experts by themselves reads less than all of them."""
    plain = experts.device.type == "cpu" and experts.dtype in (torch.float32, torch.float64)
    return (
        plain  # what `F.embedding_bag` weights, and where it was measured
        and not torch.is_grad_enabled()  # for gradients, all experts are needed anyhow
        and _known(batch)
        and 0 < batch * active < len(experts)
    )


def _mix_few(experts: Tensor, routing: Tensor, active: int) -> Tensor:
    """As `mix`, by weighted sums of the chosen experts' rows, which nothing copies."""
    out = experts.shape[1]
    shares, chosen = routing.topk(active, dim=1)  # [B, m] or [B, m, O]
    parts = math.gcd(out, BLOCKS)
    if routing.dim() == 3:
        parts = out
    else:
        shares, chosen = (t[:, :, None].expand(-1, -1, parts) for t in (shares, chosen))
    rows = chosen * parts + torch.arange(parts)
    mixed = F.embedding_bag(
        rows.transpose(1, 2).reshape(-1, active),
        experts.reshape(len(experts) * parts, -1),
        mode="sum",
        per_sample_weights=shares.transpose(1, 2).reshape(-1, active),
    )
    return mixed.reshape(len(routing), *experts.shape[1:])


def conditional_conv2d(
    x: Tensor,
    weight: Tensor,
    routing: Tensor,
    bias: Tensor | None = None,
    geometry: Geometry = Geometry(),  # noqa: B008
    form: Form = "auto",
    active: int | None = None,
) -> Tensor:
    """Convolve each example with its own mixture of kernels.

    Args:
        x: [B, C, H, W].
        weight: [E, O, C/g, h, w].
        routing: [B, E] or [B, E, O].
        bias: [O], the same for every example, or [E, O], mixed as the kernels are.
        geometry: stride, padding, dilation, groups.
        form: ``"fused"``, ``"experts"``, or the one that `choose_form` says.
        active: as for `mix`.

    Returns:
        [B, O, H', W'].

    Example:
        >>> x, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 6, 3, 3, 3)
        >>> conditional_conv2d(x, weight, torch.rand(2, 4)).shape
        torch.Size([2, 6, 6, 6])
    """
    if _is(x.shape[0], 0):
        form = "experts"  # groups of no example are no convolution
    elif form == "auto" and active is not None and _reads_few(weight, x.shape[0], active):
        form = "fused"
    if form == "auto":
        form = choose_form(x, weight, geometry)
    if bias is not None and bias.dim() == 2:
        bias = mix(bias, routing)
    if form == "fused":
        return _fused(x, weight, routing, bias, geometry, active)
    y = _experts(x, weight, routing, geometry)
    return y if bias is None else y + bias[..., None, None].to(y.dtype)


def conditional_linear(
    x: Tensor,
    weight: Tensor,
    routing: Tensor,
    bias: Tensor | None = None,
    form: Form = "auto",
    active: int | None = None,
) -> Tensor:
    """Map the last dimension by each example's own mixture of matrices.

    Args:
        x: [B, ..., C].
        weight: [E, O, C].
        routing: [B, E] or [B, E, O].
        bias: [O] or [E, O].
        form: as for `conditional_conv2d`.
        active: as for `mix`.

    Returns:
        [B, ..., O].

    Example:
        >>> x, weight = torch.randn(2, 5, 5, 3), torch.randn(4, 6, 3)
        >>> conditional_linear(x, weight, torch.rand(2, 4)).shape
        torch.Size([2, 5, 5, 6])
    """
    tokens = x[:, None] if x.dim() == 2 else x.flatten(1, -2)  # [B, N, C]
    if form == "auto" and active is not None and _reads_few(weight, x.shape[0], active):
        form = "fused"
    elif form == "auto" and x.dim() == 2:
        form = "experts"  # one position, in any graph
    elif form == "auto":
        form = choose_form(tokens.transpose(1, 2)[..., None], weight[..., None, None])
    if bias is not None:
        bias = (mix(bias, routing)[:, None] if bias.dim() == 2 else bias).to(x.dtype)
    if form == "fused":
        kernels = mix(weight, routing, active).to(tokens.dtype)
        y = _product(tokens, kernels.transpose(1, 2), bias)
    else:
        experts, out = weight.shape[:2]
        parts = 1 if routing.dim() == 2 else out
        y = F.linear(tokens, _by_parts(weight, parts))
        y = y.reshape(*tokens.shape[:2], parts, experts, out // parts)
        y = torch.matmul(_shares(routing, y.dtype)[:, None], y).flatten(2)
        y = y if bias is None else y + bias.to(y.dtype)
    return y.reshape(*x.shape[:-1], weight.shape[1])


def choose_form(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry = Geometry(),  # noqa: B008
) -> Literal["fused", "experts"]:
    """What `faster_form` says of a convolution; ``"fused"`` where its size is not known yet.

    Args:
        x: [B, C, H, W].
        weight: [E, O, C/g, h, w].
        geometry: stride, padding, dilation, groups.

    Example:
        >>> choose_form(torch.empty(1, 512, 7, 7), torch.empty(8, 512, 512, 1, 1))
        'fused'
    """
    height, width = geometry.output_size(x.shape[2], x.shape[3], (weight.shape[3], weight.shape[4]))
    if not _known(height * width):
        return "fused"
    batch = x.shape[0] if _known(x.shape[0]) else 1
    return faster_form(height * width, tuple(weight.shape), batch)


def faster_form(positions: int, shape: tuple[int, ...], batch: int = 1) -> Literal["fused", "experts"]:
    """The rule behind ``form="auto"``: is mixing an example's kernel worth its cost?

    A fused kernel is mixed, then used at ``positions``; the experts form spares the mixing
    and convolves E - 1 times more. It is the faster one up to so many further positions
    as cost what mixing and loading a kernel does: `MIXING_WORTH`, times the fourth root
    of the batch for kernels larger than 1x1 (`BATCH_POWER`). The figures are fitted to
    ``results/condconv-forms-cpu.csv`` (`research.bench.mixing_forms`), and the same fit inference
    and training. For 1x1 kernels the rows favour fused the more, the larger the batch (at one
    position, the experts), but a power of the batch in the rule gains less than 1 % of time.

    One position takes the experts, however many: fused, each example has a matrix of its
    own to hold (a million values, for 1000 classes from 1024 channels). In time alone, the
    rows have fused ahead there for some cases of 8 to 32 experts, mostly small batches in
    inference, and mostly by less than a factor of two.

    With one channel in a group, the experts' outputs go through slow convolutions: fused.
    GPUs have not been measured; the same is assumed of them.

    Args:
        positions: H' W'.
        shape: of the weight, [E, O, C/g, h, w].
        batch: B; 1 where it is not known.

    Example:
        >>> faster_form(49, (8, 512, 512, 1, 1)), faster_form(1, (8, 1000, 512, 1, 1))
        ('fused', 'experts')
    """
    experts, _, inputs, height, width = shape
    if experts > 1 and inputs == 1:
        return "fused"
    kind = "1x1" if height == width == 1 else "larger"
    worth = MIXING_WORTH[kind] * batch ** BATCH_POWER[kind]
    return "experts" if positions == 1 or (experts - 1) * positions <= worth else "fused"


def _fused(
    x: Tensor,
    weight: Tensor,
    routing: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    active: int | None = None,
) -> Tensor:
    """By mixed kernels; `bias` [O], or [B, O] where it was mixed too."""
    bias = None if bias is None else bias.to(x.dtype)
    step = _examples_at_once(x, weight, routing)
    if step is None:
        return _each(x, mix(weight, routing, active).to(x.dtype), bias, geometry)
    buffer = weight.new_empty(step, math.prod(weight.shape[1:]))
    shares, parts = routing.to(weight.dtype), []
    for start in range(0, len(x), step):
        some = slice(start, start + step)
        share = shares[some]
        if active is not None and _reads_few(weight, len(share), active):
            mixed = _mix_few(weight, share, active)
        else:
            mixed = torch.mm(share, weight.flatten(1), out=buffer[: len(share)])
            mixed = mixed.view(-1, *weight.shape[1:])
        own = bias[some] if bias is not None and bias.dim() == 2 else bias
        parts.append(_each(x[some], mixed.to(x.dtype), own, geometry))
    return torch.cat(parts)


def _examples_at_once(x: Tensor, weight: Tensor, routing: Tensor) -> int | None:
    """How many examples' kernels are mixed at a time; None: those of all."""
    if torch.is_grad_enabled() or routing.dim() == 3 or not _on_cpu(x) or not _known(x.shape[0]):
        return None  # for gradients, all are kept anyhow
    step = max(1, AT_ONCE // math.prod(weight.shape[1:]))
    return step if step < x.shape[0] else None


def _each(x: Tensor, kernels: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Convolve each example of `x` with its own of `kernels` [B, O, C/g, h, w] and its `bias`."""
    batch, out = kernels.shape[:2]
    stride, padding, _, groups = geometry
    if kernels.shape[3:] == (1, 1) and padding == (0, 0) and groups == 1:
        return _pointwise(x[:, :, :: stride[0], :: stride[1]], kernels.flatten(2), bias)
    if _exporting():
        y = _by_patches(x, kernels, geometry)
        return y if bias is None else y + bias[..., None, None]
    # Each example's own; the same for all needs no copies where examples are convolved one by one.
    biases = None if bias is None else bias.expand(batch, out)
    large = _on_cpu(x) and math.prod(kernels.shape[1:]) >= LARGE
    if _is(batch, 1) and not large:
        return F.conv2d(x, kernels[0], None if biases is None else biases[0], *geometry)
    together = geometry._replace(groups=groups * batch)
    flat = None if biases is None else biases.reshape(-1)
    if groups == x.shape[1] == out and _channels_last(x):
        return _depthwise_channels_last(x, kernels, flat, together)
    if large and _known(batch):
        own = (None,) * batch if biases is None else biases
        each = zip(torch.split(x.contiguous(), 1), kernels, own, strict=True)
        y = torch.cat([F.conv2d(one, kernel, added, *geometry) for one, kernel, added in each])
    else:  # the examples are groups of one convolution
        y = F.conv2d(x.contiguous().flatten(0, 1)[None], kernels.flatten(0, 1), flat, *together)
        y = y.reshape(batch, out, *y.shape[2:])
    return _as(x, y)


def _pointwise(x: Tensor, kernels: Tensor, bias: Tensor | None) -> Tensor:
    """A product of positions and `kernels` [B, O, C] for each example, in the layout of `x`."""
    (batch, out, _), size = kernels.shape, x.shape[2:]
    if _channels_last(x):
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
        added = None if bias is None else bias.unsqueeze(-2)
        y = _product(tokens, kernels.transpose(1, 2), added)
        return y.reshape(batch, *size, out).permute(0, 3, 1, 2)
    added = None if bias is None else bias.unsqueeze(-1)
    return _product(kernels, x.flatten(2), added).reshape(batch, out, *size)


def _product(a: Tensor, b: Tensor, added: Tensor | None) -> Tensor:
    """Products [B, M, N] of `a` [B, M, K] and `b` [B, K, N], plus `added`, in eager mode in one pass."""
    if added is None:
        return torch.bmm(a, b)
    if torch.compiler.is_compiling() or _exporting():
        return torch.bmm(a, b) + added  # a compiler joins the addition with what follows
    return torch.baddbmm(added, a, b)


def _depthwise_channels_last(x: Tensor, kernels: Tensor, bias: Tensor | None, together: Geometry) -> Tensor:
    """One convolution of B C channels, which lie side by side at each position."""
    batch, channels = kernels.shape[:2]
    side_by_side = x.permute(2, 3, 0, 1).flatten(2)[None].permute(0, 3, 1, 2)  # [1, B C, H, W]
    y = F.conv2d(side_by_side, kernels.flatten(0, 1), bias, *together)
    return _as(x, y.reshape(batch, channels, *y.shape[2:]))


def _by_patches(x: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """Unfold and multiply: no convolution, whose group count would be the batch's size."""
    stride, padding, dilation, groups = geometry
    batch, out, _, height, width = kernels.shape
    size = geometry.output_size(x.shape[2], x.shape[3], (height, width))
    patches = F.unfold(x, (height, width), dilation, padding, stride)  # [B, C h w, H' W']
    patches = patches.reshape(batch, groups, -1, size[0] * size[1])
    y = torch.matmul(kernels.reshape(batch, groups, out // groups, -1), patches)
    return y.reshape(batch, out, *size)


def _experts(x: Tensor, weight: Tensor, routing: Tensor, geometry: Geometry) -> Tensor:
    experts, out = weight.shape[:2]
    # A group's experts lie together, as a grouped convolution wants; where each channel has
    # weights of its own, each channel's do.
    parts = geometry.groups if routing.dim() == 2 else out
    y = F.conv2d(x.contiguous(), _by_parts(weight, parts), None, *geometry)
    batch, _, height, width = y.shape
    y = y.reshape(batch, parts, experts, out // parts * height * width)
    y = torch.matmul(_shares(routing, y.dtype), y)
    return _as(x, y.reshape(batch, out, height, width))


def _by_parts(weight: Tensor, parts: int) -> Tensor:
    """Kernels of all experts, [E O, ...], ordered by part of the output, expert, channel."""
    experts, out = weight.shape[:2]
    return weight.reshape(experts, parts, out // parts, *weight.shape[2:]).transpose(0, 1).flatten(0, 2)


def _shares(routing: Tensor, dtype: torch.dtype) -> Tensor:
    """Routing as the left side of a product with the experts' outputs: [B, 1 or O, 1, E]."""
    routing = routing[:, None] if routing.dim() == 2 else routing.transpose(1, 2)
    return routing[:, :, None].to(dtype)


def _known(size: int) -> bool:
    """Whether `size` is a number, rather than a symbol that a graph must keep open."""
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting() and has_static_value(size)
    return torch._C._get_tracing_state() is None


def _is(size: int, number: int) -> bool:
    return _known(size) and size == number


def _exporting() -> bool:
    return torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None


def _on_cpu(x: Tensor) -> bool:
    return x.device.type in ("cpu", "meta")


def _channels_last(x: Tensor) -> bool:
    if _exporting():
        return False  # a graph must not depend on it
    return x.stride(1) == 1 and not x.is_contiguous()


def _as(x: Tensor, y: Tensor) -> Tensor:
    """`y` in the memory format of `x`."""
    return y.contiguous(memory_format=torch.channels_last) if _channels_last(x) else y
