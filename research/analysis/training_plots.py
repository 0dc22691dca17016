"""Figures of what training gave: learning curves, and which channels are selected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pliant.figures import check_suffix, plain, write_figure
from research.analysis.routing import SelectionFrequency


def plot_curves(histories: Mapping[str, Sequence[Mapping[str, float]]], path: str | Path) -> Path:
    """Draw loss and accuracy by epoch, one colour a network.

    Solid lines are validation, dotted ones training; the distance between them is the
    gap that section 5.2 of *CNN Mixture-of-Depths* is about.

    Args:
        histories: for each label, one mapping an epoch, with ``epoch`` (from 0),
            ``train_loss``, ``val_loss``, ``train_accuracy`` and ``val_accuracy``
            (accuracies from 0 to 1): the history of a `pliant.train.Run`.
        path: where the figure goes, as SVG, PNG or PDF by its suffix.

    Returns:
        `path`.

    Raises:
        ValueError: nothing to draw, or an unknown suffix.
    """
    from matplotlib.figure import Figure

    path = check_suffix(path)
    empty = [label for label, rows in histories.items() if not rows]
    if not histories or empty:
        raise ValueError(f"no epoch to draw{' for ' + ', '.join(empty) if empty else ''}")
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for n, (label, rows) in enumerate(histories.items()):
        epochs = [row["epoch"] + 1 for row in rows]
        for axes, key, scale in ((loss, "loss", 1.0), (accuracy, "accuracy", 100.0)):
            validation = [scale * row[f"val_{key}"] for row in rows]
            training = [scale * row[f"train_{key}"] for row in rows]
            axes.plot(epochs, validation, color=f"C{n}", label=label)
            axes.plot(epochs, training, color=f"C{n}", linestyle=":", linewidth=1.2)
    loss.set(xlabel="epoch", ylabel="cross entropy", yscale="log")
    accuracy.set(xlabel="epoch", ylabel="top-1 accuracy, %")
    accuracy.legend(
        title="solid: validation, dotted: training", fontsize=8, title_fontsize=8, frameon=False
    )
    plain(loss)
    plain(accuracy)
    return write_figure(figure, path)


def plot_selection_frequency(frequency: SelectionFrequency, block: str, path: str | Path) -> Path:
    """Draw how often a block selects each channel, by class.

    Figure 4 of *CNN Mixture-of-Depths*: a row for all samples, then one for each class.

    Args:
        frequency: from `research.analysis.routing.selection_frequency`.
        block: path of the block, one of ``frequency.counts``.
        path: where the figure goes, as SVG, PNG or PDF by its suffix.

    Returns:
        `path`.

    Raises:
        ValueError: `frequency` has no such block, or an unknown suffix.
    """
    from matplotlib.figure import Figure

    path = check_suffix(path)
    if block not in frequency.counts:
        raise ValueError(f"no block {block!r}; there are {', '.join(frequency.counts)}")
    rows = [("all", frequency.overall(block))]
    rows += list(zip(frequency.classes, frequency.share(block), strict=True))
    figure = Figure(figsize=(10, 1.0 + 0.5 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for n, (axes, (label, share)) in enumerate(zip(panels, rows, strict=True)):
        axes.bar(
            range(len(share)), 100 * share.numpy(), width=0.9, color="#555555" if n == 0 else "#0072B2"
        )
        axes.set_ylabel(label, rotation=0, ha="right", va="center")
        plain(axes)
    panels[-1].set_xlabel(
        f"channel of {block}, {frequency.k[block]} of {len(rows[0][1])} selected for an image"
    )
    figure.supylabel("share of the block's selections, %", fontsize=9)
    return write_figure(figure, path)
