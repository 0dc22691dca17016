"""Figures, drawn by matplotlib without any of its global state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pliant.figures import check_suffix, plain, write_figure
from pliant.measuring.rows import AS_IS, LOWER_RESOLUTION, OF_PARTS, Measurement, controls, is_control
from pliant.tables import MACHINE_BUSY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

Quantity = Literal["accuracy", "macs", "parameters"]

# What is drawn upwards: axis label, and the unit the value is divided by.
QUANTITIES: dict[str, tuple[str, float]] = {
    "accuracy": ("top-1 accuracy, %", 0.01),
    "macs": ("multiply-accumulates an image, G", 1e9),
    "parameters": ("parameters, M", 1e6),
}

# Kind of a row: marker, colour (Okabe and Ito's, told apart by the colour-blind too).
KINDS: dict[str, tuple[str, str]] = {
    "baseline": ("s", "#000000"),
    "baseline, lower resolution": ("D", "#E69F00"),
    "converted": ("o", "#0072B2"),
    "converted, optimized": ("o", "#D55E00"),
    "converted, native": ("o", "#CC79A7"),
    "control": ("o", "#56B4E9"),
    "other": ("^", "#009E73"),
}
HOLLOW = ("baseline, lower resolution", "control")


def plot_against_latency(
    rows: Sequence[Measurement],
    y: Quantity = "accuracy",
    path: str | Path = "latency.svg",
) -> Path:
    """Accuracy, multiply-accumulates or parameters against latency, a panel a setting.

    Rows of one engine, batch, dtype, device and memory format share a panel. The bar of
    a point is the interquartile range of its time; a dotted line leads from a
    converted network to its control: its length is the tax. A vertical line marks the baseline's time.
    A row whose spread is too large to be a result (`Measurement.undecided`) is pale, and its name says so.

    Args:
        rows: measurements; those without a time or without `y` are left out.
        y: ``accuracy``, ``macs`` or ``parameters``.
        path: where the figure goes, as SVG, PNG or PDF by its suffix.

    Returns:
        `path`.

    Raises:
        ValueError: an unknown `y` or suffix, or no row that has both time and `y`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = check_figure(path, y)
    panels: dict[str, list[Measurement]] = {}
    for row in rows:
        if row.median_ms is not None and getattr(row, y) is not None:
            panels.setdefault(_setting(row), []).append(row)
    if not panels:
        raise ValueError(f"no row has both a time and {y}; there are {len(rows)} rows")

    across = min(2, len(panels))
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(6.4 * across, 4.2 * down + 0.8), layout="constrained")
    FigureCanvasAgg(figure)  # measures text; the suffix decides what is written
    for i, (setting, members) in enumerate(panels.items()):
        axes = figure.add_subplot(down, across, i + 1)
        _draw(axes, members, y)
        axes.set_title(setting, fontsize=10)
    _legend(figure, rows)
    figure.suptitle(_machine(rows), fontsize=9, color="#555555")
    figure.draw_without_rendering()  # settles the layout, on which labels depend
    figure.set_layout_engine("none")
    for axes, members in zip(figure.axes, panels.values(), strict=True):
        _label(axes, members, y)
    return write_figure(figure, path)


def check_figure(path: str | Path, y: str) -> Path:
    """`path`, if `plot_against_latency` can draw `y` to it; so that one knows before measuring.

    Raises:
        ValueError: an unknown `y` or suffix.
    """
    if y not in QUANTITIES:
        raise ValueError(f"y is {y!r}; it can be {', '.join(QUANTITIES)}")
    return check_suffix(path)


def _kind(row: Measurement) -> str:
    if row.variant == LOWER_RESOLUTION:
        return "baseline, lower resolution"
    if is_control(row.variant):
        return "control"
    if row.model == row.against:
        return "baseline"
    if row.form in OF_PARTS:
        return f"converted, {row.form}"
    return "converted" if row.tax is not None else "other"


def _setting(row: Measurement) -> str:
    layout = ", channels_last" if row.channels_last else ""
    threads = f", {row.threads} thread{'s' if row.threads > 1 else ''}" if row.device == "cpu" else ""
    return f"{row.device}, {row.engine}, {row.dtype}{layout}, batch {row.batch}{threads}"


def _machine(rows: Sequence[Measurement]) -> str:
    told = {r.hardware for r in rows} - {""}
    versions = {f"torch {r.torch}" for r in rows if r.torch}
    return " · ".join([*sorted(told), *sorted(versions)])


def _point(row: Measurement, y: str) -> tuple[float, float]:
    return row.median_ms or 0.0, float(getattr(row, y)) / QUANTITIES[y][1]


def _draw(axes: Axes, rows: Sequence[Measurement], y: str) -> None:
    for row in rows:
        marker, colour = KINDS[_kind(row)]
        axes.errorbar(
            *_point(row, y),
            xerr=(row.iqr_ms or 0.0) / 2,
            fmt=marker,
            color=colour,
            markerfacecolor="white" if _kind(row) in HOLLOW else colour,
            markersize=7,
            capsize=3,
            linewidth=1.2,
            alpha=0.35 if row.undecided else 1.0,
            zorder=3,
        )
    for row in rows:
        if bare := _bare(row, rows):
            line = zip(_point(row, y), _point(bare, y), strict=True)
            axes.plot(*line, linestyle=":", linewidth=1.2, color=KINDS[_kind(bare)][1], zorder=2)
        if _kind(row) == "baseline":
            axes.axvline(_point(row, y)[0], color="#BBBBBB", linewidth=0.8, linestyle="--", zorder=1)
    axes.margins(x=0.18, y=0.16)
    axes.set(xlabel="latency, ms a batch", ylabel=QUANTITIES[y][0])
    plain(axes)


def _legend(figure: Figure, rows: Sequence[Measurement]) -> None:
    """One legend for all panels, of the kinds that occur."""
    from matplotlib.lines import Line2D

    drawn = {(str(line.get_marker()), line.get_color()) for axes in figure.axes for line in axes.lines}
    handles = []
    for kind, (marker, colour) in KINDS.items():
        if (marker, colour) in drawn:
            face = "white" if kind in HOLLOW else colour
            style = {"marker": marker, "color": colour, "markerfacecolor": face, "linestyle": ""}
            label = ", ".join(controls(rows)) if kind == "control" else kind
            handles.append(Line2D([], [], label=label, **style))  # type: ignore[arg-type]
    columns = min(len(handles), 2 * len(figure.axes))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)


def _bare(row: Measurement, rows: Sequence[Measurement]) -> Measurement | None:
    """The control's row of the same network; None for such a row itself."""
    if row.variant != AS_IS:
        return None
    return next((r for r in rows if r.model == row.model and is_control(r.variant)), None)


def _label(axes: Axes, rows: Sequence[Measurement], y: str) -> None:
    """Name the points, each where its name meets fewest other names, points and lines.

    Controls have no name where a line leads to the whole network.
    """

    def on_page(row: Measurement, to: Measurement, t: float = 0.0) -> tuple[float, float]:
        between = [(1 - t) * a + t * b for a, b in zip(_point(row, y), _point(to, y), strict=True)]
        px, py = axes.transData.transform(between)
        return float(px), float(py)

    marks = [on_page(r, r) for r in rows]
    joined = [(r, bare) for r in rows if (bare := _bare(r, rows))]
    lines = [on_page(r, bare, t / 20) for r, bare in joined for t in range(1, 20)]
    unnamed = {id(bare) for _, bare in joined}
    taken: list[Bbox] = []
    for row, here in zip(rows, marks, strict=True):
        if id(row) in unnamed:
            continue
        choices: list[tuple[float, int, Annotation, Bbox]] = []
        for dx, dy, across, up in _PLACES:
            text = axes.annotate(
                f"{row.label} ({MACHINE_BUSY})" if row.undecided else row.label,
                _point(row, y),
                (dx, dy),
                textcoords="offset points",
                ha=across,
                va=up,
                fontsize=8,
                zorder=4,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
            )
            box, frame = text.get_window_extent(), axes.bbox
            outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
            cost = sum(box.overlaps(b) for b in taken) + 2.0 * outside
            cost += sum(m != here and box.contains(*m) for m in marks)
            cost += 0.1 * sum(box.contains(*m) for m in lines)
            choices.append((cost, len(choices), text, box))
        choices.sort(key=lambda c: c[:2])
        for _, _, text, _ in choices[1:]:
            text.remove()
        taken.append(choices[0][3])


# Offsets in points and alignment of a name, the best first.
_PLACES = (
    (0, 8, "center", "bottom"),
    (0, -8, "center", "top"),
    (9, 0, "left", "center"),
    (-9, 0, "right", "center"),
    (6, 6, "left", "bottom"),
    (-6, 6, "right", "bottom"),
    (6, -6, "left", "top"),
    (-6, -6, "right", "top"),
    (0, 18, "center", "bottom"),
    (0, -18, "center", "top"),
)
