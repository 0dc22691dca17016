"""Is an exported file the network? Its outputs, top-1 and selections are compared with eager mode.

Two engines add in different orders, so outputs differ by rounding. Where two channels' scores
are nearer to each other than they are off, rounding may exchange the two: such a *flip* is
nobody's fault, but all that follows it is another computation. So a flip is excused only if the
scores of the exchanged channels are no further apart than those two were measured to be off, and
from there on the network is made to process the channels that the file processed: whatever
follows is compared as well, and every image counts. Flips are counted.

A file of machine code does not tell what it selected. Its outputs alone are compared; an image
whose outputs differ must be a *tie*: two channels whose ranks matter have scores that are no
further apart than scores are off. Ties are counted, and most images must be none.

A file in 8-bit integers rounds coarsely, so it is another function than the network, by design. What is
asked of it is that it answers alike: the same best class for most images, and outputs of the same
direction (`check_agreement`).

Shapes: as in `pliant.deploy.selections`; outputs [B, ...], of classes [B, N].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from pliant.deploy.selections import (
    Result,
    Run,
    Selection,
    admissible,
    errors,
    rankings,
    relative_error,
    run_eager,
)

TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1, "int8": 1e-1}
# How much of its own rounding error a file may have: both it and the network are that far from the truth,
# and engines add in other orders.
OWN = 4
MOST = 0.1  # a network whose rounding is more cannot be checked


@dataclass(frozen=True)
class Parity:
    """How a file's outputs compare with the network's in eager mode.

    Attributes:
        batches: sizes that were run, each on random and on real images.
        images: that were compared.
        tolerance: largest error that is admitted, relative; `OWN` times `own_error` where that is more. Of
            a file in 8-bit integers the largest share of images with another best class, and how far
            `cosine` may be below 1.
        max_abs_error: largest error of an output, absolute.
        max_rel_error: largest error of an output over the largest absolute value of that
            image's output.
        top1_differs: images with another best class.
        top1_ties: those of them whose two best classes are no further apart than twice the error.
        selections: decisions that were compared, one for each image and part that ranks.
        score_error: largest error of a part's logits, relative; where the file does not tell
            them, that of the network in the file's precision, measured if outputs differed.
        flips: decisions for other channels, scores being nearer than they are off.
        wrong_selections: decisions for other channels that this does not excuse.
        told: the file tells its selections, or has none; otherwise its outputs alone were compared.
        unexplained: images with other outputs that are no ties, if the file does not tell.
        ties: images with other outputs whose scores tie, if the file does not tell. The errors
            and the top-1 are those of all other images.
        own_error: how far rounding alone moves the network, relative: float32 from float64, or half
            precision from float32. 0: not measured, because the file is as near as it should be.
        cosine: cosine similarity of a file's outputs in 8-bit integers with the network's, mean over the
            images; None: the file computes in floating-point numbers.
        top1_agreement: share of images with the same best class, in such a file; None: not such a file, or
            no output of it is of classes.
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
    told: bool = True
    unexplained: int = 0
    ties: int = 0
    own_error: float = 0.0
    cosine: float | None = None
    top1_agreement: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the file computes what the network does; in 8-bit integers, whether it answers alike."""
        if self.cosine is not None:
            alike = self.top1_agreement is None or 1 - self.top1_agreement <= self.tolerance
            return alike and 1 - self.cosine <= self.tolerance
        return (
            self.max_rel_error <= self.tolerance
            and (self.score_error <= self.tolerance or not self.told)
            and self.top1_differs == self.top1_ties
            and self.wrong_selections == self.unexplained == 0
            and 2 * self.ties <= self.images
        )

    def __str__(self) -> str:
        if self.cosine is not None:
            same = ""
            if self.top1_agreement is not None:
                same = f"the same top-1 for {self.top1_agreement:.1%} (needed: {1 - self.tolerance:.0%}), "
            return (
                f"{self.images} images in 8-bit integers: {same}cosine similarity of the outputs "
                f"{self.cosine:.4f} (needed: {1 - self.tolerance:.4g})"
            )
        own = f", {OWN} times what rounding alone moves the network by, {self.own_error:.1e}"
        why = own if self.own_error else ""
        text = (
            f"{self.images} images in batches of {', '.join(map(str, self.batches))}: largest error "
            f"{self.max_abs_error:.2e} absolute, {self.max_rel_error:.2e} relative (admitted: "
            f"{self.tolerance:.0e}{why}); another top-1 for {self.top1_differs} images, "
            f"{self.top1_ties} of them ties"
        )
        if self.selections:
            text += (
                f"; {self.selections} selections: scores off by {self.score_error:.2e}, other channels for "
                f"{self.flips + self.wrong_selections}, {self.flips} of them at scores nearer than that"
            )
        if not self.told:
            text += "; the file does not tell its selections"
        if self.ties or self.unexplained:
            text += (
                f"; other outputs for {self.ties + self.unexplained} images, {self.ties} of them with "
                f"scores that tie (measured error: {self.score_error:.2e})"
            )
        if 2 * self.ties > self.images:
            text += ", which are too many to tell whether it is the network"
        return text


class ParityError(ValueError):
    """A file does not compute what the network computes; `parity` has the numbers."""

    def __init__(self, message: str, parity: Parity) -> None:
        super().__init__(message)
        self.parity = parity


@dataclass
class _Tally:
    """The fields of `Parity` that are counted batch by batch."""

    images: int = 0
    max_abs_error: float = 0.0
    max_rel_error: float = 0.0
    top1_differs: int = 0
    top1_ties: int = 0
    selections: int = 0
    score_error: float = 0.0
    flips: int = 0
    wrong_selections: int = 0
    told: bool = True
    unexplained: int = 0
    ties: int = 0


def check_parity(
    network: nn.Module,
    run: Run,
    batches: list[Tensor],
    tolerance: float,
    otherwise: Callable[[], nn.Module],
    follow: bool = True,
) -> Parity:
    """Compare a file with the network, batch by batch.

    Args:
        network: in evaluation mode; the truth.
        run: runs the file.
        batches: images [B, C, H, W].
        tolerance: largest relative error.
        otherwise: makes the network in another precision, of the same images: in the file's, or
            in float64 where that is the network's own. Measures how far scores are off where the file
            does not tell them, and how far rounding moves the network.
        follow: admit more where rounding alone moves the network by more: `OWN` times as much.

    Raises:
        ValueError: the network's own outputs are not finite.
    """
    own = cache(lambda: rounding(network, otherwise(), torch.cat(batches)))
    parity = _compare(network, run, batches, tolerance, own)
    if parity.holds or not follow:
        return parity
    most = min(OWN * own().most, MOST)
    if not most > tolerance:
        return parity
    return replace(_compare(network, run, batches, most, own), own_error=own().most)


def _compare(
    network: nn.Module,
    run: Run,
    batches: list[Tensor],
    tolerance: float,
    own: Callable[[], Rounding],
) -> Parity:
    """`check_parity` by one tolerance."""
    tally = _Tally()
    for images in batches:
        found = run(images)
        expected = run_eager(network, images, _as_told(found))
        _check_finite(expected.outputs)
        wanted, seen = expected.outputs, found.outputs
        if found.selections is not None:
            _compare_selections(network, expected, found, tally, tolerance)
        elif expected.selections:
            tally.told = False
            keep = _no_ties(network, expected, found, tally, tolerance, own)
            wanted, seen = tuple(y[keep] for y in wanted), tuple(y[keep] for y in seen)
        tally.images += len(images)
        _compare_outputs(wanted, seen, tally)
    return Parity(tuple(sorted({len(images) for images in batches})), tolerance=tolerance, **vars(tally))


def check_agreement(network: nn.Module, run: Run, batches: list[Tensor], tolerance: float) -> Parity:
    """Compare a file in 8-bit integers with the network, by their answers to real images.

    Args:
        network: in evaluation mode, in float32; the truth.
        run: runs the file.
        batches: images [B, C, H, W] that were not used to calibrate it.
        tolerance: largest share of images with another best class; least cosine similarity below 1.

    Raises:
        ValueError: the network's own outputs are not finite.
    """
    tally, cosines, classes = _Tally(), [], 0
    for images in batches:
        wanted, seen = run_eager(network, images).outputs, run(images).outputs
        _check_finite(wanted)
        _compare_outputs(wanted, seen, tally)
        cosines += [
            cosine_similarity(a.flatten(1), b.flatten(1)) for a, b in zip(wanted, seen, strict=True)
        ]
        tally.images += len(images)
        classes += sum(len(y) for y in wanted if _of_classes(y))
    return Parity(
        tuple(sorted({len(images) for images in batches})),
        tolerance=tolerance,
        **vars(tally),
        cosine=float(torch.cat(cosines).mean()),
        top1_agreement=1 - tally.top1_differs / classes if classes else None,
    )


def _as_told(found: Result) -> Callable[[str, Tensor], Tensor] | None:
    """Lets blocks process the channels that a file did; None if it does not tell."""
    told = found.selections
    if told is None:
        return None
    return lambda path, logits: told[path].channels.clamp(0, logits.shape[1] - 1)


def _compare_selections(
    network: nn.Module, expected: Result, found: Result, tally: _Tally, tolerance: float
) -> None:
    """Compare decision by decision, each made by both after the same ones before it."""
    assert found.selections is not None
    by_path = rankings(network)
    for path, wanted in (expected.selections or {}).items():
        seen, by_index = found.selections[path], by_path[path].by_index
        relative = relative_error(seen.logits, wanted.logits)
        tally.selections += len(relative)
        tally.score_error = max([tally.score_error, *_numbers(relative)])
        differs = (_in_order(seen, by_index) != _in_order(wanted, by_index)).any(1)
        excused = admissible(wanted.logits, seen, by_index) & (relative <= tolerance)
        tally.flips += int((differs & excused).sum())
        tally.wrong_selections += int((differs & ~excused).sum())


def _in_order(selection: Selection, by_index: bool) -> Tensor:
    """The channels in the order in which they are processed."""
    return selection.channels.sort(1).values if by_index else selection.channels


def _no_ties(
    network: nn.Module,
    expected: Result,
    found: Result,
    tally: _Tally,
    tolerance: float,
    own: Callable[[], Rounding],
) -> Tensor:
    """Images [B] to compare: all but those with other outputs whose scores tie, which are counted."""
    relative = torch.stack([relative for _, relative in errors(expected.outputs, found.outputs)])
    off = ~(relative.amax(0) <= tolerance)
    if not off.any():
        return ~off
    scores = own().scores
    tally.score_error = max(scores.values())
    tied = torch.zeros_like(off)
    for path, ranking in rankings(network).items():
        logits = (expected.selections or {})[path].logits
        tied |= ties(logits, ranking.k, ranking.by_index, scores[path])
    # What is no number is no rounding.
    tied &= torch.stack([y.isfinite().reshape(len(y), -1).all(1) for y in found.outputs]).all(0)
    tally.ties += int((off & tied).sum())
    tally.unexplained += int((off & ~tied).sum())
    return ~(off & tied)


def ties(logits: Tensor, k: int, by_index: bool, error: float) -> Tensor:
    """Images [B] for which rounding may select or order other channels.

    Args:
        logits: [B, C].
        k: channels that are selected.
        by_index: only which channels are selected matters, not their order.
        error: error of the logits, relative to the largest of an image.

    Example:
        >>> logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.99], [3.0, 2.99, 1.0]])
        >>> ties(logits, 2, False, 0.01), ties(logits, 2, True, 0.01)
        (tensor([False,  True,  True]), tensor([False,  True, False]))
    """
    ranked = logits.topk(min(k + 1, logits.shape[1]), dim=1, sorted=True).values
    gaps = ranked[:, :-1] - ranked[:, 1:]
    if by_index:
        gaps = gaps[:, k - 1 :]  # none where all channels are selected
    # Each of two scores may be off by the error, in the network and in the file.
    return (gaps <= 4 * error * logits.abs().amax(1, keepdim=True)).any(1)


class Rounding(NamedTuple):
    """How far rounding moves a network, relative to the largest value of an image.

    Attributes:
        outputs: largest error of an output.
        scores: largest error of the logits of each part that ranks, by path.
    """

    outputs: float
    scores: dict[str, float]

    @property
    def most(self) -> float:
        """The largest of all."""
        return max(self.outputs, *self.scores.values(), 0.0)


def rounding(network: nn.Module, other: nn.Module, images: Tensor) -> Rounding:
    """Measure how far rounding moves a network.

    Args:
        network: the truth.
        other: the same in another precision; it processes the channels that `network` selects.
        images: to measure with.
    """
    true = run_eager(network, images)
    chosen = true.selections or {}
    seen = run_eager(other, images, lambda path, _: chosen[path].channels)
    scores = {
        path: float(relative_error(selection.logits, chosen[path].logits).max())
        for path, selection in (seen.selections or {}).items()
    }
    outputs = [float(relative.max()) for _, relative in errors(true.outputs, seen.outputs)]
    return Rounding(max(outputs), scores)


def _compare_outputs(wanted: tuple[Tensor, ...], found: tuple[Tensor, ...], tally: _Tally) -> None:
    if not len(wanted[0]):
        return
    for (absolute, relative), true, seen in zip(errors(wanted, found), wanted, found, strict=True):
        tally.max_abs_error = max([tally.max_abs_error, *_numbers(absolute)])
        tally.max_rel_error = max([tally.max_rel_error, *_numbers(relative)])
        if _of_classes(true):
            differs = true.argmax(1) != seen.argmax(1)
            best = true.topk(2, dim=1).values
            taken = true.gather(1, seen.argmax(1, keepdim=True))[:, 0]
            tally.top1_differs += int(differs.sum())
            tally.top1_ties += int((differs & (best[:, 0] - taken <= 2 * absolute)).sum())


def _of_classes(output: Tensor) -> bool:
    """Whether an output may be scores of classes, [B, N]."""
    return output.dim() == 2 and output.shape[1] > 1


def _check_finite(outputs: tuple[Tensor, ...]) -> None:
    if not all(bool(y.isfinite().all()) for y in outputs):
        raise ValueError("the network's own outputs are not finite, so no file can be compared")


def _numbers(values: Tensor) -> list[float]:
    """The values as Python's numbers; what is no number as infinity."""
    return [float(v) for v in values.nan_to_num(nan=float("inf"), posinf=float("inf"))]
