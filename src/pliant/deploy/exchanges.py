"""Outputs of a file that does not tell its selections, explained by channels whose scores tie.

Machine code of AOTInductor gives outputs alone. Where these are not the network's, rounding may
have exchanged two channels with nearly the same score; so the network is run with such channels
exchanged. The file is excused only if these outputs are its own. Scores tie where they are
no further apart than four times the measured error of scores: each of the two may be off by
it, in the network and in the file.

The search is greedy: of all exchanges of neighbours in a ranking, that which comes nearest to the
file's outputs, then one more. What it tries is admissible, so it may miss an explanation but not
find a false one.

Shapes in this file::

    B  batch, here of attempts   logits  [B, C]      relevance of the channels
    C  channels                  ranks   [B, k + 1]  channels, best first, and the next
    k  processed                 image   [1, ...]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pliant.deploy.selections import Result, relative_error, run_eager, selectors, worst

MOST = 8  # exchanges that may explain an image
WIDTH = 32  # attempts for each of them, the nearest scores first


class Exchange(NamedTuple):
    """A block's channels of the ranks `rank` and `rank` + 1, counted from 0, change places."""

    block: str
    rank: int


class Explanation(NamedTuple):
    """What the network gives for one image with some channels exchanged."""

    outputs: tuple[Tensor, ...]
    exchanges: tuple[Exchange, ...]


def score_noise(network: nn.Module, other: nn.Module, images: Tensor) -> dict[str, float]:
    """How far each block's scores are off by rounding, relative to the largest of an image.

    Args:
        network: the truth.
        other: the same in another precision; it processes the channels that `network` selects.
        images: to measure with.
    """
    true = run_eager(network, images).selections or {}
    seen = run_eager(other, images, lambda path, _: true[path].channels).selections or {}
    return {path: float(relative_error(seen[path].logits, true[path].logits).max()) for path in true}


def explain(
    network: nn.Module,
    image: Tensor,
    found: tuple[Tensor, ...],
    noise: Mapping[str, float],
    tolerance: float,
) -> Explanation | None:
    """The admissible exchanges that make the network's outputs those of a file; None: there are none.

    Args:
        network: the truth.
        image: [1, ...].
        found: what the file gave for it, [1, ...] each.
        noise: by block, from `score_noise`.
        tolerance: within which outputs must agree, relative.
    """
    if not all(bool(y.isfinite().all()) for y in found):
        return None
    made: tuple[Exchange, ...] = ()
    here = _Attempts([made], network, noise)
    outputs = here.run(network, image).outputs
    off = float(worst(outputs, found))
    while off > tolerance:
        tries = [(*made, e) for e in here.ties(0) if e not in made][:WIDTH]
        if len(made) == MOST or not tries:
            return None
        several = _Attempts(tries, network, noise)
        given = several.run(network, image.expand(len(tries), *image.shape[1:])).outputs
        wanted = tuple(y.expand(len(tries), *y.shape[1:]) for y in found)
        errors = worst(given, wanted).where(several.valid, torch.inf)
        best = int(errors.argmin())
        if not float(errors[best]) < off:
            return None
        off, made = float(errors[best]), tries[best]
        outputs = tuple(y[best : best + 1] for y in given)
        here = several.only(best)
    return Explanation(outputs, made)


class _Attempts:
    """Runs an image several times, each with exchanges of its own.

    Args:
        tries: exchanges of each attempt, applied in their order.
        network: whose blocks they are.
        noise: by block.

    Attributes:
        valid: attempts [B] whose exchanges were all between scores that tie.
        ranks: by block, [B, k + 1] after the exchanges.
        logits: by block, [B, C].
    """

    def __init__(
        self, tries: list[tuple[Exchange, ...]], network: nn.Module, noise: Mapping[str, float]
    ) -> None:
        self.tries, self.noise, self.blocks = tries, noise, selectors(network)
        self.valid = torch.ones(len(tries), dtype=torch.bool)
        self.ranks: dict[str, Tensor] = {}
        self.logits: dict[str, Tensor] = {}

    def run(self, network: nn.Module, images: Tensor) -> Result:
        """What the network gives for `images` [B, ...], one an attempt."""
        return run_eager(network, images, self._choose)

    def only(self, n: int) -> _Attempts:
        """Attempt `n` alone, as it was run."""
        one = _Attempts([self.tries[n]], nn.Identity(), self.noise)
        one.blocks = self.blocks
        one.ranks = {path: ranks[n : n + 1] for path, ranks in self.ranks.items()}
        one.logits = {path: logits[n : n + 1] for path, logits in self.logits.items()}
        return one

    def ties(self, n: int) -> list[Exchange]:
        """Neighbours in attempt `n` whose scores tie, the nearest first."""
        found = []
        for path, ranks in self.ranks.items():
            near = self._gaps(path)[n] / self._margin(path)[n].clamp(min=1e-30)
            # Where channels are processed in their own order, it matters only which they are.
            first = self.blocks[path].k - 1 if self.blocks[path].order == "index" else 0
            found += [(float(near[r]), Exchange(path, r)) for r in range(first, ranks.shape[1] - 1)]
        return [exchange for near, exchange in sorted(found) if near <= 1]

    def _choose(self, path: str, logits: Tensor) -> Tensor:
        k = self.blocks[path].k
        ranks = logits.topk(min(k + 1, logits.shape[1]), dim=1, sorted=True).indices
        self.logits[path], self.ranks[path] = logits, ranks
        margin = self._margin(path)
        for n, exchanges in enumerate(self.tries):
            for r in (e.rank for e in exchanges if e.block == path):
                pair = ranks[n, r : r + 2]
                gap = (logits[n, pair[0]] - logits[n, pair[1]]).abs()
                self.valid[n] &= bool(gap <= margin[n])
                ranks[n, r : r + 2] = pair.flip(0)
        return ranks[:, :k]

    def _gaps(self, path: str) -> Tensor:
        """How far neighbours are apart, [B, k]."""
        return self.logits[path].gather(1, self.ranks[path]).diff(dim=1).abs()

    def _margin(self, path: str) -> Tensor:
        """How far scores may be apart that tie, [B]."""
        return 4 * self.noise[path] * self.logits[path].abs().amax(1)
