"""Time the depths of an adaptive network, and choose one within a budget: `profile_depths`.

Shapes: images [B, C, H, W]; a latency is that of a whole batch, as everywhere in pliant.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pliant import anatomy
from pliant.figures import check_suffix, plain, write_figure
from pliant.measuring.latency import Progress, measure
from pliant.measuring.rows import Measurement, read_rows, write_rows
from pliant.methods.adaptive_depth.depth import at_depth, depths, subnet
from pliant.methods.adaptive_depth.switch import (
    Skip,
    SkipLike,
    check_skip,
    check_skips,
    depth_name,
    find_depth,
)

Accuracy = Mapping[Skip, float] | Mapping[str, float] | Callable[[nn.Module], float]

FRONT = "on the front"
DEPTH = "depth "  # what `Measurement.variant` begins with

# Okabe and Ito's, told apart by the colour-blind too.
_ON, _OFF = "#0072B2", "#999999"


@dataclass(frozen=True)
class DepthProfile:
    """Latency, counts and, where it is known, accuracy of each depth of a network.

    Attributes:
        rows: one row for each depth, with machine and versions; its `variant` is ``depth TTFF``
            (one letter a stage, T skips).

    Raises:
        ValueError: the rows are not the depths of one network, each once; an accuracy is NaN; no
            row has a time.
    """

    rows: tuple[Measurement, ...]

    def __post_init__(self) -> None:
        skips = [skip_of(row) for row in self.rows]
        if len(set(skips)) < len(skips) or len({len(skip) for skip in skips}) > 1:
            raise ValueError(
                f"the rows are {', '.join(f'{row.model} {row.variant}' for row in self.rows)}; give the "
                f"depths of one network, each once"
            )
        for row in self.rows:
            if row.accuracy is not None and math.isnan(row.accuracy):
                raise ValueError(f"the accuracy of {row.label} is {row.accuracy}; give a share, 0 to 1")
        if not any(row.median_ms is not None for row in self.rows):
            raise ValueError(
                f"no depth has a time: {self.rows[0].error if self.rows else 'there is no row'}"
            )

    @property
    def front(self) -> tuple[Measurement, ...]:
        """The Pareto front: rows to which no faster row is equal or better; fastest first.

        Better is more accurate; where accuracies are not known, more multiply-accumulates.
        """
        best: list[Measurement] = []
        for row in sorted(self._timed(), key=lambda r: (_ms(r), -self._worth(r))):
            if not best or self._worth(row) > self._worth(best[-1]):
                best.append(row)
        return tuple(best)

    def choose(self, *, budget_ms: float | None = None, macs: int | None = None) -> Skip:
        """The best depth within a budget: the most accurate one, or the one of most operations.

        Args:
            budget_ms: largest median latency in milliseconds, of a batch such as was measured.
                Leave room for the spread.
            macs: largest number of multiply-accumulates of one image.

        Returns:
            Flags for `pliant.set_depth`.

        Raises:
            ValueError: no budget, or two; no depth within it; `macs` where a row has none.

        Example:
            >>> rows = [Measurement(model="net", variant="depth F", macs=9, median_ms=2.0)]
            >>> rows.append(Measurement(model="net", variant="depth T", macs=5, median_ms=1.5))
            >>> DepthProfile(tuple(rows)).choose(budget_ms=1.8)
            (True,)
        """
        if (budget_ms is None) == (macs is None):
            raise ValueError(f"budget_ms is {budget_ms!r} and macs is {macs!r}; give one of the two")
        name, limit, cost = ("macs", macs, _macs) if budget_ms is None else ("budget_ms", budget_ms, _ms)
        if not isinstance(limit, (int, float)) or isinstance(limit, bool) or not 0 < limit < math.inf:
            raise ValueError(f"{name} is {limit!r}; give a number above 0")
        if budget_ms is None and any(row.macs is None for row in self._timed()):
            raise ValueError("macs of a depth are not known; give budget_ms instead of macs")
        within = [row for row in self._timed() if cost(row) <= limit]
        if not within:
            least = min(self._timed(), key=cost)
            kind, unit = ("smallest", "multiply-accumulates") if budget_ms is None else ("fastest", "ms")
            raise ValueError(
                f"no depth is within {name}={limit:g}; the {kind}, {depth_name(skip_of(least))}, takes "
                f"{cost(least):.4g} {unit}"
            )
        return skip_of(max(within, key=lambda r: (self._worth(r), -_ms(r), -_macs(r))))

    def save(self, path: str | Path) -> Path:
        """Write the rows to a CSV file; returns `path`."""
        write_rows(path, self.rows)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> DepthProfile:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is damaged or foreign, or its rows are not depths.
        """
        return cls(tuple(read_rows(path)))

    def plot(self, path: str | Path) -> Path:
        """Draw each depth's accuracy, or its multiply-accumulates, against its latency.

        The front is a line of filled points with their flags; the other depths are grey.

        Args:
            path: file of the figure: SVG, PNG or PDF by its suffix.

        Returns:
            `path`.

        Raises:
            ValueError: an unknown suffix.
        """
        from matplotlib.figure import Figure

        path = check_suffix(path)
        front = self.front
        rest = [row for row in self._timed() if row not in front]
        scale = 0.01 if self.has_accuracy else 1e6
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for rows, style, color, label in ((rest, "o", _OFF, "beaten"), (front, "o-", _ON, "front")):
            worth = [self._worth(row) / scale for row in rows]
            axes.plot([_ms(row) for row in rows], worth, style, color=color, label=label, zorder=3)
        for row in front:
            axes.annotate(
                row.variant.removeprefix(DEPTH),
                (_ms(row), self._worth(row) / scale),
                textcoords="offset points",
                xytext=(6, -10),
                fontsize="small",
            )
        first = front[0]
        axes.set_xlabel(f"latency, ms ({first.device}, batch {first.batch}, {first.engine})")
        axes.set_ylabel("top-1 accuracy, %" if self.has_accuracy else "multiply-accumulates, M")
        axes.set_title(f"{first.model}: depths (T skips)")
        axes.legend(frameon=False)
        plain(axes)
        return write_figure(figure, path)

    def _timed(self) -> list[Measurement]:
        return [row for row in self.rows if row.median_ms is not None]

    @property
    def has_accuracy(self) -> bool:
        """Whether the accuracy of all depths is known."""
        return all(row.accuracy is not None for row in self._timed())

    def _worth(self, row: Measurement) -> float:
        return float(row.accuracy or 0) if self.has_accuracy else _macs(row)


def _ms(row: Measurement) -> float:
    assert row.median_ms is not None
    return row.median_ms


def _macs(row: Measurement) -> float:
    return row.macs or 0


def skip_of(row: Measurement) -> Skip:
    """The flags of a row of a `DepthProfile`.

    Raises:
        ValueError: the row is not that of a depth.

    Example:
        >>> skip_of(Measurement(model="resnet50_adn", variant="depth TTFF"))
        (True, True, False, False)
    """
    try:
        if row.variant.startswith(DEPTH):
            return check_skip(row.variant.removeprefix(DEPTH))
    except ValueError:
        pass
    raise ValueError(f"{row.label} is not a row of a depth; its variant must be like 'depth TTFF'")


class _OnSharedWeights(nn.Module):
    """One depth on the weights of all: a copy of it is itself, so all take the memory of one."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        return self.network(x)

    def __deepcopy__(self, memo: dict[int, Any]) -> _OnSharedWeights:
        return self


def profile_depths(
    model: nn.Module,
    example: Tensor,
    engine: str = "eager",
    *,
    accuracy: Accuracy | None = None,
    skips: Iterable[SkipLike] | None = None,
    threads: int | None = None,
    rounds: int = 9,
    min_run_time: float = 0.05,
    progress: Progress | None = None,
) -> DepthProfile:
    """Time the depths of a network on its device, in turn, in evaluation mode.

    The network is not changed. Each depth is timed as its `subnet`, which is what
    `compile_depths` runs; the network itself costs a little more in eager mode.

    Args:
        model: a network converted by `AdaptiveDepth`, with the device, dtype and memory format
            that it serves with.
        example: images [B, C, H, W] of the shape that it serves.
        engine: ``eager``, or ``compiled`` (`torch.compile`).
        accuracy: accuracy of each depth, a share in [0, 1]: a mapping from flags (``"TTFF"`` or
            booleans), or a function that is called with `model` at each depth. None: depths are
            ranked by their multiply-accumulates.
        skips: which depths, such as ``["TTFF", "FFFF"]``; None: all.
        threads: threads of PyTorch; None: `torch.get_num_threads`.
        rounds: how often each depth is timed.
        min_run_time: shortest time that one depth runs in one round, in seconds.
        progress: called with the steps done, the number of steps, and what comes next.

    Raises:
        ValueError: the network has no adaptive depth; wrong flags; a missing accuracy; an
            example that the network does not take; as `pliant.measure`.

    Example:
        >>> import timm, torch, pliant
        >>> model = timm.create_model("resnet20_cifar_adn")
        >>> both = [(False, False, False), (True, True, True)]
        >>> x = torch.randn(1, 3, 32, 32)
        >>> profile = profile_depths(model, x, skips=both, rounds=1, min_run_time=0)
        >>> profile.choose(macs=30_000_000)
        (True, True, True)
    """
    flags = len(find_depth(model).skip)
    if example.dim() != 4:
        raise ValueError(f"example has the shape {tuple(example.shape)}; give images [B, C, H, W]")
    chosen = check_skips(skips, flags)
    batch, channels, height, width = example.shape
    like = next(p for p in model.parameters() if p.is_floating_point())
    worth = _accuracies(model, chosen, accuracy)
    whole = copy.deepcopy(model).eval()
    networks = {depth_name(skip): _OnSharedWeights(subnet(whole, skip, share=True)) for skip in chosen}
    measured = measure(
        networks,
        input_size=(channels, height, width),
        batch=batch,
        device=like.device,
        dtype=like.dtype,
        channels_last=anatomy.is_channels_last(model),
        engine=engine,
        threads=threads,
        rounds=rounds,
        min_run_time=min_run_time,
        tax=False,
        progress=progress,
    )
    rows = tuple(
        replace(row, model=anatomy.name_of(model), variant=f"{DEPTH}{row.model}", accuracy=worth.get(skip))
        for row, skip in zip(measured, chosen, strict=True)
    )
    profile = DepthProfile(rows)
    front = {row.variant for row in profile.front}
    return DepthProfile(tuple(replace(row, note=FRONT) if row.variant in front else row for row in rows))


def counted(model: nn.Module) -> list[Measurement]:
    """Parameters and multiply-accumulates of each depth, as the rows of a profile without times.

    Args:
        model: a network converted by `AdaptiveDepth`; weights on the meta device will do.

    Raises:
        ValueError: the network has no adaptive depth.

    Example:
        >>> import timm
        >>> counted(timm.create_model("resnet20_cifar_adn"))[0].label
        'resnet20_cifar_adn depth FFF'
    """
    name = anatomy.name_of(model)
    return [
        Measurement(model=name, variant=DEPTH + depth_name(d.skip), parameters=d.parameters, macs=d.macs)
        for d in depths(model)
    ]


def _accuracies(model: nn.Module, skips: Sequence[Skip], accuracy: Accuracy | None) -> dict[Skip, float]:
    if accuracy is None:
        return {}
    given = {} if callable(accuracy) else {check_skip(skip): value for skip, value in accuracy.items()}
    found = {}
    for skip in skips:
        if callable(accuracy):
            with at_depth(model, skip), torch.no_grad():
                value = accuracy(model)
        elif skip in given:
            value = given[skip]
        else:
            known = ", ".join(map(depth_name, given)) or "none"
            raise ValueError(f"accuracy has no value for depth {depth_name(skip)}; it has {known}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"the accuracy of depth {depth_name(skip)} is {value!r}; give a share, 0 to 1")
        found[skip] = float(value)
    return found
