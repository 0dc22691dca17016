"""Is an exported file the network? Outputs, top-1 and selected channels, held against eager.

Two engines add in different orders, so outputs differ by rounding. Where two channels' scores
are nearer to each other than they are off, rounding may exchange the two: such a *flip* is
nobody's fault, but all that follows it is another computation. So a flip is excused only if the
scores of the exchanged channels are no further apart than those two were measured to be off, and
from there on the network is made to process the channels that the file processed: whatever
follows is compared as well, and every image counts. Of a file that does not tell what it selected,
outputs that are not the network's must be those of the network with tied channels exchanged
(`pliant.deploy.exchanges`). Flips are counted.

Shapes in this file::

    B  batch             logits    [B, C]  relevance of the channels
    C  channels          channels  [B, k]  those that were selected, best first
    k  processed         outputs   [B, ...], classes [B, N]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from pliant.deploy.exchanges import explain, score_noise
from pliant.deploy.selections import (
    Result,
    Run,
    Selection,
    admissible,
    errors,
    relative_error,
    run_eager,
    selectors,
    worst,
)

TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


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
        score_error: largest error of a selector's logits, relative; where the file does not tell
            them, that of the network in the file's precision, measured if outputs had to be explained.
        flips: decisions for other channels, scores being nearer than they are off; where the file
            does not tell, exchanges of such channels that explain its outputs.
        wrong_selections: decisions for other channels that this does not excuse.
        told: the file tells its selections, or has none; otherwise its outputs alone were compared.
        unexplained: images whose outputs are not those of the network, whatever channels tie, of a
            file that does not tell.
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

    @property
    def holds(self) -> bool:
        """Whether the file computes what the network does."""
        return (
            self.max_rel_error <= self.tolerance
            and (self.score_error <= self.tolerance or not self.told)
            and self.top1_differs == self.top1_ties
            and self.wrong_selections == self.unexplained == 0
        )

    def __str__(self) -> str:
        text = (
            f"{self.images} images in batches of {', '.join(map(str, self.batches))}: largest error "
            f"{self.max_abs_error:.2e} absolute, {self.max_rel_error:.2e} relative (admitted: "
            f"{self.tolerance:.0e}); another top-1 for {self.top1_differs} images, {self.top1_ties} of "
            f"them ties"
        )
        if self.selections:
            text += (
                f"; {self.selections} selections: scores off by {self.score_error:.2e}, other channels for "
                f"{self.flips + self.wrong_selections}, {self.flips} of them at scores nearer than that"
            )
        if not self.told:
            text += "; the file does not tell its selections"
        if self.flips and not self.told:
            text += (
                f", and {self.flips} exchanges of channels with nearly the same score (measured error: "
                f"{self.score_error:.2e}) explain its outputs"
            )
        if self.unexplained:
            text += f"; no such exchange explains those for {self.unexplained} images"
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
    told: bool = True
    unexplained: int = 0


def check_parity(
    network: nn.Module,
    run: Run,
    batches: list[Tensor],
    tolerance: float,
    otherwise: Callable[[], nn.Module],
) -> Parity:
    """Compare a file with the network, batch by batch.

    Args:
        network: in evaluation mode; the truth.
        run: runs the file.
        batches: images [B, C, H, W].
        tolerance: largest relative error.
        otherwise: makes the network in another precision, of the same images: in the file's, or
            in float64 where that is the network's own. Measures how far scores are off where the file
            does not tell them.

    Raises:
        ValueError: the network's own outputs are not finite.
    """
    tally = _Tally()
    noise = cache(lambda: score_noise(network, otherwise(), torch.cat(batches)))
    for images in batches:
        found = run(images)
        expected = run_eager(network, images, _as_told(found))
        if not all(bool(y.isfinite().all()) for y in expected.outputs):
            raise ValueError(
                "the network's own outputs are not finite, so nothing can be held against them"
            )
        wanted = expected.outputs
        if found.selections is not None:
            _compare_selections(network, expected, found, tally, tolerance)
        elif expected.selections:
            tally.told = False
            wanted = _explained(network, images, wanted, found, tally, tolerance, noise)
        _compare_outputs(wanted, found.outputs, tally)
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
        told=tally.told,
        unexplained=tally.unexplained,
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
    blocks = selectors(network)
    for path, wanted in (expected.selections or {}).items():
        seen, by_index = found.selections[path], blocks[path].order == "index"
        relative = relative_error(seen.logits, wanted.logits)
        tally.selections += len(relative)
        tally.score_error = max([tally.score_error, *_numbers(relative)])
        differs = (_in_order(seen, by_index) != _in_order(wanted, by_index)).any(1)
        excused = admissible(wanted.logits, seen, by_index) & (relative <= tolerance)
        tally.flips += int((differs & excused).sum())
        tally.wrong += int((differs & ~excused).sum())


def _in_order(selection: Selection, by_index: bool) -> Tensor:
    """The channels in the order in which they are processed."""
    return selection.channels.sort(1).values if by_index else selection.channels


def _explained(
    network: nn.Module,
    images: Tensor,
    wanted: tuple[Tensor, ...],
    found: Result,
    tally: _Tally,
    tolerance: float,
    noise: Callable[[], Mapping[str, float]],
) -> tuple[Tensor, ...]:
    """The network's outputs, with tied channels exchanged where that gives those of the file."""
    off = (~(worst(wanted, found.outputs) <= tolerance)).nonzero()[:, 0].tolist()
    if not off:
        return wanted
    tally.score_error = max(noise().values())
    outputs = tuple(y.clone() for y in wanted)
    for n in off:
        given = tuple(y[n : n + 1] for y in found.outputs)
        explanation = explain(network, images[n : n + 1], given, noise(), tolerance)
        if explanation is None:
            tally.unexplained += 1
            continue
        tally.flips += len(explanation.exchanges)
        for y, explained in zip(outputs, explanation.outputs, strict=True):
            y[n] = explained[0]
    return outputs


def _compare_outputs(wanted: tuple[Tensor, ...], found: tuple[Tensor, ...], tally: _Tally) -> None:
    tally.images += len(wanted[0])
    for (absolute, relative), true, seen in zip(errors(wanted, found), wanted, found, strict=True):
        tally.max_abs = max([tally.max_abs, *_numbers(absolute)])
        tally.max_rel = max([tally.max_rel, *_numbers(relative)])
        if true.dim() == 2 and true.shape[1] > 1:
            differs = true.argmax(1) != seen.argmax(1)
            best = true.topk(2, dim=1).values
            taken = true.gather(1, seen.argmax(1, keepdim=True))[:, 0]
            tally.top1_differs += int(differs.sum())
            tally.top1_ties += int((differs & (best[:, 0] - taken <= 2 * absolute)).sum())


def _numbers(values: Tensor) -> list[float]:
    """The values as Python's numbers; what is no number as infinity."""
    return [float(v) for v in values.nan_to_num(nan=float("inf"), posinf=float("inf"))]
