"""Is an exported file the network? Outputs, top-1 and selected channels, held against eager.

Two engines add in different orders, so outputs differ by rounding. Where two channels' scores
are nearer to each other than the engines' scores are, rounding may exchange the two: such a
*flip* is nobody's fault, but all that follows it is another computation. So each selection is
compared where it is made; a flip is excused only if the scores of the exchanged channels are
no further apart than twice the error of the scores (each may be off by it), the scores
themselves must agree, and an image behind a flip is compared no further. Flips are counted.

Shapes in this file::

    B  batch             logits    [B, C]  relevance of the channels
    C  channels          channels  [B, k]  those that were selected, best first
    k  processed         outputs   [B, ...], classes [B, N]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pliant.methods.selectors import ChannelSelector

TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


class Selection(NamedTuple):
    """What one selector saw and chose: logits [B, C], channels [B, k], best first."""

    logits: Tensor
    channels: Tensor


class Result(NamedTuple):
    """What came out of one forward.

    Attributes:
        outputs: the network's.
        selections: of its Mixture-of-Depths blocks by path; None where an engine does not tell.
    """

    outputs: tuple[Tensor, ...]
    selections: Mapping[str, Selection] | None


Run = Callable[[Tensor], Result]


@dataclass(frozen=True)
class Parity:
    """How a file's outputs compare with the network's in eager mode.

    Attributes:
        batches: sizes that were run, each on random and on real images.
        images: that were compared.
        tolerance: largest error that is admitted, relative.
        max_abs_error: of an output.
        max_rel_error: over the largest absolute value of that image's output.
        top1_differs: images with another best class.
        top1_ties: of these, images whose two best classes are no further apart than twice the
            error.
        selections: decisions that were compared, one for each image and MoD block.
        score_error: largest error of a selector's logits, relative.
        flips: decisions for other channels, scores being nearer than twice their error.
        wrong_selections: decisions for other channels that this does not excuse.
    """

    batches: tuple[int, ...]
    images: int
    tolerance: float
    max_abs_error: float
    max_rel_error: float
    top1_differs: int
    top1_ties: int
    selections: int
    score_error: float
    flips: int
    wrong_selections: int

    @property
    def holds(self) -> bool:
        """Whether the file computes what the network does."""
        return (
            self.max_rel_error <= self.tolerance
            and self.score_error <= self.tolerance
            and self.top1_differs == self.top1_ties
            and self.wrong_selections == 0
            and self.images > 0
        )

    def __str__(self) -> str:
        text = (
            f"{self.images} images in batches of {', '.join(map(str, self.batches))}: largest error "
            f"{self.max_abs_error:.2e} absolute, {self.max_rel_error:.2e} relative (admitted: "
            f"{self.tolerance:.0e}); another top-1 for {self.top1_differs} images, {self.top1_ties} of "
            f"them ties"
        )
        if not self.images:
            text += (
                "; nothing was left to compare, because scores of selectors tie for every image (those of "
                "a silent selector are all zero): check with other images, or train the network"
            )
        if self.selections:
            text += (
                f"; {self.selections} selections: scores off by {self.score_error:.2e}, other channels for "
                f"{self.flips + self.wrong_selections}, {self.flips} of them at scores nearer than that"
            )
        return text


class ParityError(ValueError):
    """A file does not compute what the network computes; `parity` has the numbers."""

    def __init__(self, message: str, parity: Parity) -> None:
        super().__init__(message)
        self.parity = parity


@dataclass
class _Tally:
    images: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0
    top1_differs: int = 0
    top1_ties: int = 0
    selections: int = 0
    score_error: float = 0.0
    flips: int = 0
    wrong: int = 0


def check_parity(
    network: nn.Module, run: Run, batches: list[Tensor], tolerance: float, chosen_by_index: frozenset[str]
) -> Parity:
    """Compare a file with the network, batch by batch.

    Args:
        network: in evaluation mode; the truth.
        run: runs the file.
        batches: images [B, C, H, W].
        tolerance: largest relative error.
        chosen_by_index: paths of the blocks whose cores get the channels in their own order, so
            that the order of their scores does not matter.

    Raises:
        ValueError: the network's own outputs are not finite.
    """
    tally = _Tally()
    for images in batches:
        expected, found = run_eager(network, images), run(images)
        if not all(bool(y.isfinite().all()) for y in expected.outputs):
            raise ValueError(
                "the network's own outputs are not finite, so nothing can be held against them"
            )
        alive = _compare_selections(expected, found, tally, tolerance, chosen_by_index, len(images))
        if found.selections is None and expected.selections:
            alive = _apart(expected, tolerance) | _near(expected, found, tolerance)
            tally.flips += int((~alive).sum())
        _compare_outputs(expected, found, tally, alive)
    return Parity(
        batches=tuple(sorted({len(images) for images in batches})),
        images=tally.images,
        tolerance=tolerance,
        max_abs_error=tally.max_abs,
        max_rel_error=tally.max_rel,
        top1_differs=tally.top1_differs,
        top1_ties=tally.top1_ties,
        selections=tally.selections,
        score_error=tally.score_error,
        flips=tally.flips,
        wrong_selections=tally.wrong,
    )


def run_eager(network: nn.Module, images: Tensor) -> Result:
    """The network's outputs, and what its selectors saw and chose."""
    selections: dict[str, Selection] = {}
    with _watched(network, selections), torch.no_grad():
        outputs = network(images)
    return Result(as_tuple(outputs), selections)


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    """The outputs of a network, one or several, as a tuple."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


@contextmanager
def _watched(network: nn.Module, selections: dict[str, Selection]) -> Iterator[None]:
    def note(path: str, selector: ChannelSelector, args: tuple[Tensor, ...], _output: Any) -> None:
        logits = selector.logits(args[0])
        selections[path] = Selection(logits, logits.topk(selector.k, dim=1, sorted=True).indices)

    handles = [
        module.register_forward_hook(partial(note, path)) for path, module in selectors(network).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def selectors(network: nn.Module) -> dict[str, ChannelSelector]:
    """The selectors of a network's Mixture-of-Depths blocks, by the paths of the blocks in it."""
    return {
        path.removesuffix(".selector").removeprefix("network."): module
        for path, module in network.named_modules()
        if isinstance(module, ChannelSelector)
    }


def _compare_selections(
    expected: Result,
    found: Result,
    tally: _Tally,
    tolerance: float,
    by_index: frozenset[str],
    count: int,
) -> Tensor:
    """Compare decision by decision; returns which images [B] went the same way throughout."""
    alive = torch.ones(count, dtype=torch.bool)
    if found.selections is None:
        return alive
    for path, wanted in (expected.selections or {}).items():
        seen = found.selections[path]
        error = (seen.logits - wanted.logits).abs().amax(1)
        relative = error / wanted.logits.abs().amax(1).clamp(min=1e-30)
        tally.selections += int(alive.sum())
        tally.score_error = max([tally.score_error, *_numbers(relative[alive])])
        other = seen.channels != wanted.channels
        if path in by_index:
            same_set = (seen.channels.sort(1).values == wanted.channels.sort(1).values).all(1)
            other = other & ~same_set[:, None]
        known = (seen.channels >= 0) & (seen.channels < wanted.logits.shape[1])
        taken = wanted.logits.gather(1, seen.channels.clamp(0, wanted.logits.shape[1] - 1))
        gap = (wanted.logits.gather(1, wanted.channels) - taken).abs().where(other, 0.0).amax(1)
        excused = (gap <= 2 * error) & known.all(1) & (relative <= tolerance)
        differs = other.any(1) & alive
        tally.flips += int((differs & excused).sum())
        tally.wrong += int((differs & ~excused).sum())
        alive = alive & ~differs
    return alive


def _apart(expected: Result, tolerance: float) -> Tensor:
    """Images [B] whose scores are all so far apart that no rounding exchanges two."""
    apart = []
    for logits, channels in (expected.selections or {}).values():
        ranked = logits.sort(dim=1, descending=True).values[:, : channels.shape[1] + 1]
        gaps = (ranked[:, :-1] - ranked[:, 1:]).amin(1) if ranked.shape[1] > 1 else ranked[:, 0].abs()
        apart.append(gaps > tolerance * logits.abs().amax(1))
    return torch.stack(apart).all(0)


def _near(expected: Result, found: Result, tolerance: float) -> Tensor:
    """Images [B] whose outputs agree within the tolerance."""
    return torch.stack([rel <= tolerance for _, rel in _errors(expected, found)]).all(0)


def _errors(expected: Result, found: Result) -> list[tuple[Tensor, Tensor]]:
    """Absolute and relative error of each output, by image [B]."""
    if len(expected.outputs) != len(found.outputs):
        raise ValueError(
            f"the file gives {len(found.outputs)} outputs, the network {len(expected.outputs)}"
        )
    errors = []
    for wanted, seen in zip(expected.outputs, found.outputs, strict=True):
        if wanted.shape != seen.shape:
            raise ValueError(f"the file gives {tuple(seen.shape)}, the network {tuple(wanted.shape)}")
        # A value that is no number is off by infinitely much.
        off = (seen - wanted).abs().nan_to_num(nan=float("inf"), posinf=float("inf")).flatten(1).amax(1)
        errors.append((off, off / wanted.abs().flatten(1).amax(1).clamp(min=1e-30)))
    return errors


def _compare_outputs(expected: Result, found: Result, tally: _Tally, alive: Tensor) -> None:
    errors = _errors(expected, found)
    tally.images += int(alive.sum())
    for (absolute, relative), wanted, seen in zip(errors, expected.outputs, found.outputs, strict=True):
        tally.max_abs = max([tally.max_abs, *_numbers(absolute[alive])])
        tally.max_rel = max([tally.max_rel, *_numbers(relative[alive])])
        if wanted.dim() == 2 and wanted.shape[1] > 1:
            differs = (wanted.argmax(1) != seen.argmax(1)) & alive
            best = wanted.topk(2, dim=1).values
            taken = wanted.gather(1, seen.argmax(1, keepdim=True))[:, 0]
            tally.top1_differs += int(differs.sum())
            tally.top1_ties += int((differs & (best[:, 0] - taken <= 2 * absolute)).sum())


def _numbers(values: Tensor) -> list[float]:
    """The values as Python's numbers; what is no number as infinity."""
    return [float(v) for v in values.nan_to_num(nan=float("inf"), posinf=float("inf"))]
