"""The first five minutes: train on real images, measure, and write one page.

Plain, Mixture-of-Depths, control, CondConv and adaptive depth networks learn scikit-learn's digits
at one recipe; ResNet-50 and its Mixture-of-Depths form are timed at 224 pixels. One table says what
each costs and scores; ``report.html`` adds the curves, the plots and which channels
the selectors choose for which class (figure 4 of the paper, for this data).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pliant.commands._common import progress_of
from pliant.compare import PLAIN, Score, compare, controls_by_name, write_scores
from pliant.methods.adaptive_depth.method import subnet
from pliant.methods.adaptive_depth.switch import Depth, depth_name, depth_role
from pliant.report import FigureBlock, TableBlock, write_report
from pliant.tables import WHY_UNDECIDED
from research.marks import put_between

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from pliant.measuring.rows import Measurement
    from pliant.train import Run

RECIPE = "digits.resnet18"
LARGE, LARGE_MOD, LOWER_PIXELS = "resnet50", "resnet50_mod", 176
LEARNED = "MoD, score order"
EXPERTS = "CondConv, 4 experts"
DEPTHS = "ADN"
VERSIONS = ("pliant", "torch", "timm", "python")
BEGIN, END = "<!-- quickstart:begin -->", "<!-- quickstart:end -->"
COLUMNS = ("label", "accuracy", "parameters", "macs", "time", "time_ratio", "tax")
LEAVE_OUT = ("against",)  # the row whose ratio is 1.00
ROUNDS = 31
DIGITS_SECONDS, LARGE_SECONDS = 15.0, 45.0  # of timing, at most


def quickstart(
    folder: str | Path = "runs/quickstart",
    *,
    changes: Sequence[str] = (),
    large: tuple[str, str] = (LARGE, LARGE_MOD),
    threads: int | None = None,
    readme: str | Path | None = None,
    results: str | Path | None = None,
    console: Console | None = None,
) -> Path:
    """Train, measure, print one table, and write ``report.html``.

    Finished runs in `folder` are not trained again; delete the folder to start over.

    Args:
        folder: for runs, rows (``scores.csv``, ``latency.csv``), figures and the page.
        changes: ``key=value`` changes of the recipe, as `pliant train` takes them.
        large: the plain and the Mixture-of-Depths network that are timed at 224 px.
        threads: of PyTorch; by default as many as it takes by itself.
        readme: a file whose part between the quickstart marks gets the table.
        results: a folder that gets the rows too, as ``quickstart-{scores,latency}.csv``.
        console: of rich, to print on.

    Returns:
        Path of the page.
    """
    import torch
    from rich.console import Console

    from pliant.measuring.rows import terminal_table, write_rows

    console = console or Console()
    folder = Path(folder)
    if threads is not None:
        torch.set_num_threads(threads)
    recipes = controls_by_name(RECIPE, changes)
    recipes[EXPERTS] = controls_by_name(RECIPE, changes, "condconv")[EXPERTS]
    recipes[DEPTHS] = controls_by_name(RECIPE, changes, "adn")[DEPTHS]
    console.print(
        f"Training {len(recipes)} networks on scikit-learn's digits, "
        f"{recipes[PLAIN].epochs} epochs each, {torch.get_num_threads()} threads."
    )
    done = compare(
        recipes,
        folder / "runs",
        started=lambda label, _: console.print(f"[bold]{label}[/bold]"),
        finished=lambda _, run: console.print(f"  test accuracy {100 * (run.test_accuracy or 0):.1f} %"),
        networks=last_stages_first,
    )
    scores = [score for score, _ in done.values()]
    write_scores(folder / "scores.csv", scores)
    rows = _latencies(done, large, console)
    write_rows(folder / "latency.csv", rows)
    if results is not None:
        write_scores(Path(results) / "quickstart-scores.csv", scores)
        write_rows(Path(results) / "quickstart-latency.csv", rows)
    page = _page(folder, done, rows)
    console.print(terminal_table(rows, COLUMNS, LEAVE_OUT, console.width))
    console.print(f"The page: {page}")
    if readme is not None:
        _into_readme(Path(readme), rows)
    return page


def last_stages_first(model: nn.Module) -> dict[str, nn.Module]:
    """Sub-networks by name, from the whole network to the base network: each skips one stage more.

    Empty for a network without adaptive depth.

    Example:
        >>> import timm
        >>> list(last_stages_first(timm.create_model("resnet20_cifar_adn")))
        ['super-net', 'FFT', 'FTT', 'base-net']
    """
    flags = next((len(m.skip) for m in model.modules() if isinstance(m, Depth)), -1)
    skips = [tuple(n >= flags - skipped for n in range(flags)) for skipped in range(flags + 1)]
    names = [f"{role}-net" if (role := depth_role(skip)) else depth_name(skip) for skip in skips]
    return {name: subnet(model, skip) for name, skip in zip(names, skips, strict=True)}


def _latencies(
    done: dict[str, tuple[Score, Run]], large: tuple[str, str], console: Console
) -> list[Measurement]:
    """Rows for the trained networks at their size, and for the large ones at 224 px."""
    from pliant.measuring.latency import measure
    from pliant.measuring.rows import AS_IS

    scores = {label: score for label, (score, _) in done.items()}
    size = next(iter(scores.values()))
    small = {label: run.model for label, (_, run) in done.items()}
    with progress_of(f"Timing them at {size.pixels} px", console) as step:
        rows = measure(
            small,
            against=PLAIN,
            input_size=(done[PLAIN][1].recipe.in_chans, size.pixels, size.pixels),
            channels_last=True,
            rounds=ROUNDS,
            max_run_time=DIGITS_SECONDS,
            min_run_time=0.02,
            progress=step,
        )
    # The networks without blocks are in the table by themselves, trained.
    rows = [replace(r, accuracy=scores[r.model].test_accuracy) for r in rows if r.variant == AS_IS]
    plain, mod = large
    with progress_of(f"Timing {plain} and {mod} at 224 px", console) as step:
        rows += measure(
            [plain, mod],
            against=plain,
            channels_last=True,
            lower_resolution=LOWER_PIXELS,
            rounds=ROUNDS,
            max_run_time=LARGE_SECONDS,
            progress=step,
        )
    return rows


def _page(folder: Path, done: dict[str, tuple[Score, Run]], rows: list[Measurement]) -> Path:
    from pliant.compare import HEADINGS, summary
    from pliant.measuring.figure import plot_against_latency
    from pliant.measuring.rows import layout
    from research.analysis.training_plots import plot_curves

    digits = [r for r in rows if r.accuracy is not None]
    large = [r for r in rows if r.accuracy is None]
    figures = folder / "figures"
    # Curves of an adaptive network are those of its full depth; other depths were scored at the end.
    curves = {
        label: run.history for label, (_, run) in done.items() if len(run.history) == run.recipe.epochs
    }
    plot_curves(curves, figures / "curves.svg")
    plot_against_latency(digits, "accuracy", figures / "accuracy.svg")
    plot_against_latency(large, "macs", figures / "macs.svg")
    selected_table, selected_figure = _selections(figures, done)
    blocks = [
        FigureBlock(
            "Training",
            "Solid: validation; dotted: training (the loss under augmentation, accuracy without).",
            figures / "curves.svg",
        ),
        FigureBlock(
            "Accuracy against latency, digits",
            "Batch 1. Networks this small are bound by the number of operators, not by arithmetic. "
            "Points named ADN are depths of one network, one set of weights (T: the stage skips).",
            figures / "accuracy.svg",
        ),
        FigureBlock(
            "Operations against latency, 224 px",
            "Batch 1. Where operations fell and time did not, a point lies below the baseline, not left.",
            figures / "macs.svg",
        ),
        selected_figure,
    ]
    shared, headings, cells = layout(rows, COLUMNS, LEAVE_OUT)
    scores = [score for score, _ in done.values()]
    first = rows[0]
    return write_report(
        folder / "report.html",
        "Plain, Mixture-of-Depths, CondConv and adaptive depth networks: cost and score",
        findings=_findings(scores, large),
        tables=[
            TableBlock("What each costs and scores", shared, headings, cells),
            TableBlock(
                "Training",
                f"{scores[0].epochs} epochs, one seed ({scores[0].seed})",
                HEADINGS,
                summary(scores),
            ),
            selected_table,
        ],
        figures=blocks,
        provenance={
            "command": "python -m research quickstart",
            "machine": f"{first.hardware}, {first.os}",
            "threads": first.threads,
            "versions": ", ".join(f"{name} {getattr(first, name)}" for name in VERSIONS),
            "commit": first.commit or "installed package",
            "date": first.date,
            "rows": "scores.csv and latency.csv beside this page",
        },
    )


def _selections(figures: Path, done: dict[str, tuple[Score, Run]]) -> tuple[TableBlock, FigureBlock]:
    """Selection frequency of channels: by block, and by class (figure 4 of the paper)."""
    from pliant.train.data import load_data
    from pliant.train.run import read_division
    from research.analysis.routing import selection_frequency
    from research.analysis.training_plots import plot_selection_frequency

    _, run = done[LEARNED]
    data = load_data(run.recipe, read_division(run.folder))
    found = selection_frequency(run.model, data.batches("test"), data.classes)
    rows = []
    for block, counts in found.counts.items():
        kinds = len(found.always(block)), len(found.never(block))
        rows.append((block, str(counts.shape[1]), str(found.k[block]), *map(str, kinds)))
    table = TableBlock(
        "What is selected",
        f"Channels of “{LEARNED}”, over all test images. Where as many are selected for every image as "
        f"for one, the selection does not depend on the image at all.",
        ("block", "channels", "selected for an image", "for every image", "for none"),
        rows,
    )
    # The paper shows one of the third stage; where that one is constant, there is nothing to see.
    block = min(found.counts, key=lambda path: len(found.always(path)) / found.k[path])
    figure = FigureBlock(
        "Which channels are selected, by class",
        f"{block} of “{LEARNED}”, the block whose selection varies most; test images, a row for each "
        f"class. Where rows are alike, selection hardly depends on the class.",
        plot_selection_frequency(found, block, figures / "selection.svg"),
    )
    return table, figure


def _findings(scores: Sequence[Score], large: Sequence[Measurement]) -> list[str]:
    from pliant.measuring.rows import AS_IS, LOWER_RESOLUTION

    best = max(scores, key=lambda s: s.test_accuracy or 0)
    worst = min(scores, key=lambda s: s.test_accuracy or 0)
    said = [
        f"On digits every network scores between {100 * (worst.test_accuracy or 0):.1f} % ({worst.label}) "
        f"and {100 * (best.test_accuracy or 0):.1f} % ({best.label}), one seed each: digits show that a "
        f"network learns, not which is better."
    ]
    mod = next((r for r in large if r.tax is not None and r.variant == AS_IS), None)
    smaller = next((r for r in large if r.variant == LOWER_RESOLUTION and r.time_ratio), None)
    if any(row.undecided for row in large):
        return [*said, f"{LARGE_MOD} beside {LARGE}: {WHY_UNDECIDED}."]
    if mod and mod.time_ratio and mod.tax is not None:
        said.append(
            f"{mod.model} takes {mod.time_ratio:.2f} of {mod.against}'s time (MACs: {mod.mac_ratio:.2f}) "
            f"on this machine in eager PyTorch, batch {mod.batch}, {mod.threads} threads. Its "
            f"Mixture-of-Depths blocks add {100 * mod.tax:.0f} % to the same network without them: "
            f"the MoD tax."
        )
    if smaller and smaller.time_ratio:
        said.append(f"A second baseline: {smaller.label} takes {smaller.time_ratio:.2f} of the time.")
    return said


def _into_readme(path: Path, rows: Sequence[Measurement]) -> None:
    """Put the table between the marks of a Markdown file."""
    from pliant.measuring.rows import markdown_table

    put_between(path, BEGIN, END, markdown_table(rows, COLUMNS, LEAVE_OUT))
