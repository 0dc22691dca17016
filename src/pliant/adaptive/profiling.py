"""Latency of all depths of an adaptive network on the device at hand, and a budget for it.

Shapes: images [B, C, H, W]; a latency is that of a whole batch, as everywhere in pliant.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import Tensor, nn

from pliant import anatomy
from pliant.figures import check_suffix
from pliant.measuring.latency import Progress, measure
from pliant.measuring.rows import CONDITIONS, Measurement, read_rows, terminal_table, write_rows
from pliant.methods.adaptive_depth.depth import at_depth, depths, subnet
from pliant.methods.adaptive_depth.switch import Skip, check_skips, depth_name, find_depth

if TYPE_CHECKING:
    from rich.table import Table

Accuracy = Mapping[Skip, float] | Callable[[nn.Module], float]

FRONT = "on the front"
_DEPTH = "depth "  # what `Measurement.variant` begins with


@dataclass(frozen=True)
class DepthProfile:
    """What each depth of a network costs, and what it is worth where that is known.

    Attributes:
        rows: a row for each depth, with times, counts, accuracy and where all that comes
            from; its `variant` is ``depth TTFF``, a letter a stage, T skips.

    Raises:
        ValueError: rows of something else than the depths of one network, each once; an accuracy
            that is no number; no time.
    """

    rows: tuple[Measurement, ...]

    def __post_init__(self) -> None:
        skips = [skip_of(row) for row in self.rows]
        if len(set(skips)) < len(skips) or len({len(skip) for skip in skips}) > 1:
            raise ValueError(
                f"a profile holds the depths of one network, each once; these are "
                f"{', '.join(f'{row.model} {row.variant}' for row in self.rows)}"
            )
        for row in self.rows:
            if row.accuracy is not None and math.isnan(row.accuracy):
                raise ValueError(f"the accuracy of {row.label} is no number: {row.accuracy}")
        if not any(row.median_ms is not None for row in self.rows):
            raise ValueError(
                f"no depth has a time: {self.rows[0].error if self.rows else 'there is no row'}"
            )

    @property
    def front(self) -> tuple[Measurement, ...]:
        """The rows that no other one beats: not slower, and worth as much; fastest first.

        A row is worth its accuracy; where none is known, its multiply-accumulates.
        """
        best: list[Measurement] = []
        for row in sorted(self._timed(), key=lambda r: (_ms(r), -self._worth(r))):
            if not best or self._worth(row) > self._worth(best[-1]):
                best.append(row)
        return tuple(best)

    def choose(self, *, budget_ms: float | None = None, macs: int | None = None) -> Skip:
        """The best depth within a budget: most accurate, or most multiply-accumulates.

        Args:
            budget_ms: milliseconds of a batch such as was measured; medians are held
                against it, so leave room for the spread.
            macs: multiply-accumulates of one image.

        Returns:
            Flags for `pliant.set_depth`.

        Raises:
            ValueError: no budget or two; none that a depth keeps; `macs` of rows without them.

        Example:
            >>> rows = [Measurement(model="net", variant="depth F", macs=9, median_ms=2.0)]
            >>> rows.append(Measurement(model="net", variant="depth T", macs=5, median_ms=1.5))
            >>> DepthProfile(tuple(rows)).choose(budget_ms=1.8)
            (True,)
        """
        if (budget_ms is None) == (macs is None):
            raise ValueError("give exactly one budget: budget_ms, or macs")
        name, unit, cost = ("macs", "multiply-accumulates", _macs) if budget_ms is None else _MS
        limit: float | None = macs if budget_ms is None else budget_ms
        if not isinstance(limit, (int, float)) or isinstance(limit, bool) or not 0 < limit < math.inf:
            raise ValueError(f"{name} must be a number above 0, not {limit!r}")
        if budget_ms is None and any(row.macs is None for row in self._timed()):
            raise ValueError("not every depth's multiply-accumulates are known: give budget_ms")
        within = [row for row in self._timed() if cost(row) <= limit]
        if not within:
            least = min(self._timed(), key=cost)
            raise ValueError(
                f"no depth keeps {name}={limit:g}: the {'fastest' if unit == 'ms' else 'smallest'}, "
                f"{skip_of(least)}, takes {cost(least):.4g} {unit}"
            )
        return skip_of(max(within, key=lambda r: (self._worth(r), -_ms(r), -_macs(r))))

    def save(self, path: str | Path) -> Path:
        """Write the rows to a CSV file, as all measurements of pliant; returns `path`."""
        write_rows(path, self.rows)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> DepthProfile:
        """Read what `save` wrote.

        Raises:
            ValueError: a damaged or foreign file, or rows of something else than depths.
        """
        return cls(tuple(read_rows(path)))

    def plot(self, path: str | Path) -> Path:
        """Draw latency against worth, and the front; see `analysis.profile_plots`."""
        from pliant.adaptive.profile_plots import plot_profile

        return plot_profile(self, path)

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
        ValueError: a row of something else.

    Example:
        >>> skip_of(Measurement(model="resnet50_adn", variant="depth TTFF"))
        (True, True, False, False)
    """
    letters = row.variant.removeprefix(_DEPTH)
    if not row.variant.startswith(_DEPTH) or not letters or set(letters) - {"T", "F"}:
        raise ValueError(f"{row.label} is no row of a depth: its variant must be like 'depth TTFF'")
    return tuple(letter == "T" for letter in letters)


_MS = ("budget_ms", "ms", _ms)


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
    skips: Sequence[Sequence[bool]] | None = None,
    threads: int | None = None,
    rounds: int = 9,
    min_run_time: float = 0.05,
    progress: Progress | None = None,
) -> DepthProfile:
    """Time all depths of a network where it is, in turn, in evaluation mode.

    The network stays as it is. Each depth is timed as its `subnet`, which is what
    `compile_depths` runs; the switched network in eager mode costs a little more.

    Args:
        model: a network converted by `AdaptiveDepth`, on the device, in the dtype and
            memory format in which it serves.
        example: images [B, C, H, W] of the shape that it serves.
        engine: ``eager``, or ``compiled`` (`torch.compile`).
        accuracy: of each depth in percent, as a mapping from flags, or a function that is
            called with `model` at each depth. None: depths are ranked by their MACs.
        skips: which depths; None: all.
        threads: of PyTorch's pool; by default as many as it takes.
        rounds: how often each depth is timed.
        min_run_time: seconds that one depth runs in one round, at least.
        progress: called with steps done, steps in all, and what comes next.

    Raises:
        ValueError: no adaptive network, no depths, wrong flags; an accuracy that is missing; an
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
        raise ValueError(f"example must be images [B, C, H, W], not of shape {tuple(example.shape)}")
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
        replace(row, model=_name(model), variant=f"{_DEPTH}{row.model}", accuracy=worth.get(skip))
        for row, skip in zip(measured, chosen, strict=True)
    )
    profile = DepthProfile(rows)
    front = {row.variant for row in profile.front}
    return DepthProfile(tuple(replace(row, note=FRONT) if row.variant in front else row for row in rows))


def depth_report(
    network: str | nn.Module,
    times: Mapping[str, Any] | None = None,
    rows: Path | None = None,
    plot: Path | None = None,
) -> Table:
    """All depths of a network as a table for a terminal: what ``pliant depths`` prints.

    Args:
        network: an adaptive network, or a name that timm knows.
        times: batch, device and options of `profile_depths`; None: counts alone.
        rows: CSV file that gets the rows.
        plot: figure that is drawn of them.

    Raises:
        ValueError: a name that timm does not know; as `profile_depths`.
    """
    if isinstance(network, str):
        if not timm.is_model(network):
            raise ValueError(f"timm knows no model {network!r}, and there is no such folder")
        with torch.device("cpu" if times else "meta"):  # counts need no weights
            model: nn.Module = timm.create_model(network)
    else:
        model = network
    if times is None:
        name = _name(model)
        counted = [
            Measurement(
                model=name, variant=f"{_DEPTH}{depth_name(d.skip)}", parameters=d.parameters, macs=d.macs
            )
            for d in depths(model)
        ]
        return terminal_table(counted, ["label", "parameters", "macs"], leave_out=list(CONDITIONS))
    if plot is not None:
        check_suffix(plot)  # before the timing, not after
    size = anatomy.input_size(model)
    if size is None:
        raise ValueError("the network does not say its input size; use pliant.profile_depths")
    options = dict(times)
    batch, device = options.pop("batch"), options.pop("device")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} is not available: PyTorch sees no GPU; give cpu")
    found = profile_depths(model.to(device), torch.zeros(batch, *size), **options)
    if rows is not None:
        found.save(rows)
    if plot is not None:
        found.plot(plot)
    return terminal_table(found.rows)


def _name(model: nn.Module) -> str:
    config = getattr(model, "pretrained_cfg", None) or {}
    return str(config.get("architecture") or type(model).__name__)


def _accuracies(model: nn.Module, skips: Sequence[Skip], accuracy: Accuracy | None) -> dict[Skip, float]:
    if accuracy is None:
        return {}
    found = {}
    for skip in skips:
        if callable(accuracy):
            with at_depth(model, skip), torch.no_grad():
                value = accuracy(model)
        elif skip in accuracy:
            value = accuracy[skip]
        else:
            raise ValueError(f"accuracy has no value for depth {skip}; it has {list(accuracy)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 100:
            raise ValueError(f"the accuracy of depth {skip} must be in percent, 0 to 100; it is {value!r}")
        found[skip] = float(value)
    return found
