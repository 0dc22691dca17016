"""Forwards whose selections are seen, and may be told: what the parity check compares.

Shapes in this file::

    B  batch             logits    [B, C]  relevance of the channels
    C  channels          channels  [B, k]  those that were selected, best first
    k  processed         images    [B, ...]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pliant.parts import Ranking, parts


class Selection(NamedTuple):
    """What one selector saw and chose: logits [B, C], channels [B, k], best first."""

    logits: Tensor
    channels: Tensor


class Result(NamedTuple):
    """What came out of one forward.

    Attributes:
        outputs: the network's.
        selections: by the paths of the parts that rank; None where an engine does not tell.
    """

    outputs: tuple[Tensor, ...]
    selections: Mapping[str, Selection] | None


Run = Callable[[Tensor], Result]
# From the path of a ranking part and its logits [B, C] to the channels [B, k] to process, best first.
Choose = Callable[[str, Tensor], Tensor]


def run_eager(network: nn.Module, images: Tensor, choose: Choose | None = None) -> Result:
    """The network's outputs, and what its ranking parts saw and would choose.

    Args:
        network: in evaluation mode.
        images: [B, ...].
        choose: which channels the network processes; None: those that its parts choose. The
            result holds what the parts would have chosen all the same.
    """
    seen: dict[str, Selection] = {}

    def note(path: str, ranking: Ranking, _: nn.Module, args: tuple[Tensor, ...], given: Any) -> Any:
        logits = ranking.logits(args[0])
        seen[path] = Selection(logits, logits.topk(ranking.k, dim=1, sorted=True).indices)
        if choose is None:
            return given
        channels = choose(path, logits)
        return ranking.outcome(logits, channels.sort(1).values if ranking.by_index else channels)

    found = rankings(network)
    modules = {_plain(path): part for path, part in parts(network).items()}
    handles = [modules[p].register_forward_hook(partial(note, p, ranking)) for p, ranking in found.items()]
    try:
        with torch.no_grad():
            outputs = network(images)
    finally:
        for handle in handles:
            handle.remove()
    return Result(as_tuple(outputs), seen)


def rankings(network: nn.Module) -> dict[str, Ranking]:
    """How the parts of a network select channels, by the paths of the parts that do.

    The paths are those in the network itself, also where `network` prepares images for it
    (`pliant.deploy.inputs.Prepared`).
    """
    found = {_plain(path): part.ranking() for path, part in parts(network).items()}
    return {path: ranking for path, ranking in found.items() if ranking is not None}


def _plain(path: str) -> str:
    return path.removeprefix("network.")


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    """The outputs of a network, one or several, as a tuple."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def one_or_several(outputs: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """What a network returns: its one output, or a tuple of several."""
    return outputs[0] if len(outputs) == 1 else outputs


def told_beside(found: tuple[Tensor, ...], outputs: int, ranking: list[str]) -> Result:
    """The result of a file that gives the logits and channels of the parts `ranking` after its outputs."""
    pairs = zip(found[outputs::2], found[outputs + 1 :: 2], strict=True)
    chosen = [Selection(x.flatten(1), i.flatten(1).to(torch.int64)) for x, i in pairs]
    return Result(found[:outputs], dict(zip(ranking, chosen, strict=True)))


def errors(expected: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
    """Absolute and relative error of each output, by image [B].

    Relative to the largest absolute value of that image's output. A value that is no number is off
    by infinitely much.

    Raises:
        ValueError: there are more or fewer outputs, or of other shapes.
    """
    if len(expected) != len(found):
        raise ValueError(f"the file gives {len(found)} outputs, the network {len(expected)}")
    both = []
    for wanted, seen in zip(expected, found, strict=True):
        if wanted.shape != seen.shape:
            raise ValueError(f"the file gives {tuple(seen.shape)}, the network {tuple(wanted.shape)}")
        off = (seen - wanted).abs().nan_to_num(nan=float("inf"), posinf=float("inf"))
        off = off.reshape(len(off), -1).amax(1)
        both.append((off, off / wanted.abs().reshape(len(off), -1).amax(1).clamp(min=1e-30)))
    return both


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """The largest error of an image's logits [B, C], over the largest of them: [B]."""
    return (found - wanted).abs().amax(1) / wanted.abs().amax(1).clamp(min=1e-30)


def admissible(wanted: Tensor, found: Selection, by_index: bool) -> Tensor:
    """Images [B] whose selection differs from that of `wanted` by no more than scores are off.

    Each score may have been anything between the two that were measured, or as far on the other
    side: two channels may have changed places, or one been selected in place of another, only
    where their scores are no further apart than these two are off together.

    Args:
        wanted: logits [B, C] of the network.
        found: of the file.
        by_index: the order of the selected channels does not matter.

    Example:
        >>> wanted = torch.tensor([[3.0, 2.0, 1.0]])
        >>> found = Selection(torch.tensor([[3.0, 2.0, 1.2]]), torch.tensor([[0, 2]]))
        >>> admissible(wanted, found, False)  # off by 0.2, and a whole 1 apart
        tensor([False])
        >>> admissible(torch.tensor([[3.0, 1.1, 1.0]]), found, False)
        tensor([True])
    """
    count = wanted.shape[1]
    known = (found.channels >= 0) & (found.channels < count)
    channels = found.channels.clamp(0, count - 1)
    ranked = channels.sort(1).values
    distinct = (ranked[:, 1:] > ranked[:, :-1]).all(1)
    true = wanted.double()
    off = (found.logits.double() - true).abs()
    most, least = true + off, true - off
    rest = least.scatter(1, channels, -torch.inf).amax(1)
    most, least = most.gather(1, channels), least.gather(1, channels)
    fine = known.all(1) & distinct & (most.amin(1) >= rest)
    if by_index or channels.shape[1] == 1:
        return fine
    behind = least.flip(1).cummax(1).values.flip(1)[:, 1:]  # the largest of those ranked below
    return fine & (most[:, :-1] >= behind).all(1)
