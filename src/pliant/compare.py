"""Train networks side by side at one recipe, and score them.

An accuracy says little without its controls. `controls_by_name` asks a method for its controls
and baselines. `compare` trains the recipes that it is given, and returns a `Score` for each. A
finished run is not run again, so a comparison that was killed goes on where it stopped.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn

from pliant import tables
from pliant.methods import METHODS
from pliant.recipes import get_recipe
from pliant.recipes._networks import objective_of
from pliant.records import Origin, percent, read_records, write_records
from pliant.surgery import networks_in
from pliant.train.recipe import Recipe, differences, override

if TYPE_CHECKING:
    from rich.table import Table

    from pliant.train import Evaluation, Run

PLAIN = "plain"


@dataclass(frozen=True, kw_only=True)
class Score(Origin):
    """What one training run cost and reached. Accuracies are shares in [0, 1]; percent in tables and files.

    Attributes:
        label: the network's role in the comparison.
        recipe: name of the recipe.
        model: network that ``timm.create_model`` builds.
        model_args: its arguments, as JSON.
        data: name of the data set.
        pixels: height and width of the images.
        epochs: passes over the training images.
        seed: of initial weights, order and augmentation.
        parameters: learnable values.
        macs: multiply-accumulates of one image.
        train_accuracy: of the best epoch, as `fit` logs it.
        val_accuracy: of the best epoch.
        train_ce: cross entropy on training images in that epoch, without augmentation or
            smoothing: capacity (section 4.1 of CondConv).
        gap: training minus validation accuracy (section 5.2 of the paper).
        test_accuracy: of the best epoch's weights, tested once.
        seconds: of training. Machines differ; compare within one comparison only.
    """

    PERCENT: ClassVar[tuple[str, ...]] = ("train_accuracy", "val_accuracy", "gap", "test_accuracy")

    label: str
    recipe: str
    model: str
    model_args: str
    data: str
    pixels: int
    epochs: int
    seed: int
    parameters: int
    macs: int
    train_accuracy: float
    train_ce: float
    val_accuracy: float
    gap: float
    test_accuracy: float | None
    seconds: float


def controls(
    plain: Recipe, converted: Recipe, changes: Mapping[str, Mapping[str, Any]]
) -> dict[str, Recipe]:
    """A plain network's recipe, and those of all forms of its converted network.

    Args:
        plain: of the plain network.
        converted: of the converted one, with the options that all forms share.
        changes: for each label, what its form changes in the options.

    Raises:
        ValueError: the two recipes differ in more than their network, and its objective if its
            method brings one.

    Example:
        >>> one, two = get_recipe("digits.resnet18"), get_recipe("digits.resnet18_mod")
        >>> list(controls(one, two, METHODS["MixtureOfDepths"].comparisons()["mod"]))[:2]
        ['plain', 'MoD, score order']
    """
    network = ["name", "note", "model", "model_args"]
    if objective_of(converted.model) != objective_of(plain.model):
        network.append("objective")
    other = differences(plain, converted, leaving_out=network)
    if other:
        raise ValueError(
            f"{plain.name} and {converted.name} differ in {', '.join(other)}: no fair comparison"
        )
    return {PLAIN: plain} | {
        label: replace(converted, model_args={**converted.model_args, **options})
        for label, options in changes.items()
    }


def controls_by_name(name: str, changes: Sequence[str] = (), method: str = "mod") -> dict[str, Recipe]:
    """`controls` for the recipe of a plain network and its form by a method.

    Args:
        name: of the plain network's recipe, ``"cifar10.resnet20"``.
        changes: ``key=value`` strings, applied to both.
        method: a comparison that a method has (`Method.comparisons`): ``"mod"``, ``"condconv"``,
            ``"condconv-ablations"``, ``"adn"``, or the suffix of another package's method.

    Raises:
        ValueError: no such comparison or recipe, or the network has no such form.
    """
    known = {one: (cls, labels) for cls in METHODS.values() for one, labels in cls.comparisons().items()}
    if method not in known:
        raise ValueError(f"no comparison for {method!r}; there is one for {', '.join(known)}")
    cls, labels = known[method]
    data, _, rest = name.partition(".")
    network, dot, ending = rest.partition(".")
    names = (name, f"{data}.{cls.network_name(network)}{dot}{ending}")
    plain, converted = (override(get_recipe(one), changes) for one in names)
    found = controls(plain, converted, labels)
    others = {
        label: replace(plain, model_args=arguments)
        for label, arguments in cls.baselines(plain.model, plain.model_args).items()
    }
    return {PLAIN: found.pop(PLAIN), **others, **found}


def compare(
    recipes: Mapping[str, Recipe],
    folder: str | Path,
    *,
    progress: bool = True,
    started: Callable[[str, Recipe], None] | None = None,
    finished: Callable[[str, Run], None] | None = None,
    networks: Callable[[nn.Module], Mapping[str, nn.Module]] = networks_in,
    **fit_options: Any,
) -> dict[str, tuple[Score, Run]]:
    """Train and test each recipe in turn.

    Args:
        recipes: by label.
        folder: each run gets a folder of its own in it, named after label and seed; one
            that holds the finished run of the same recipe is read instead.
        progress: show `fit`'s progress bar.
        started: called with label and recipe before each run.
        finished: called with label and run after it.
        networks: which networks of a trained one are scored, by name, the one that it runs as
            first; by default those that it was trained to be (`Method.networks`). None: itself.
        fit_options: further keywords of `pliant.train.fit`.

    Returns:
        Score and run for each label, in the order given. A network that is several has a label, a
        score and a run for each (``"ADN, super-net"``, ``"ADN, base-net"``; see `run_as`).
    """
    from pliant.train import fit

    done: dict[str, tuple[Score, Run]] = {}
    for label, recipe in recipes.items():
        if started:
            started(label, recipe)
        place = run_folder(folder, label, recipe)
        run = fit(recipe, place, resume=(place / "recipe.json").is_file(), progress=progress, **fit_options)
        inner = networks(run.model)
        runs = {
            f"{label}, {name}": run_as(run, network) if n else replace(run, model=network)
            for n, (name, network) in enumerate(inner.items())
        } or {label: run}
        done |= {name: (_score(name, one), one) for name, one in runs.items()}
        if finished:
            finished(label, run)
    return done


def run_as(run: Run, network: nn.Module) -> Run:
    """A network that was trained within another one, as if it had a run of its own.

    Args:
        run: of the network that was trained.
        network: one of those that it is (`pliant.surgery.networks_in`).

    Returns:
        The run with `network`. Its accuracies are scored now, in float32, and the history has one
        row, the best epoch's (the same one: `Run.best_epoch`).

    Raises:
        FileNotFoundError: the images that it was trained on are no longer there.
    """
    from pliant.train.data import load_data
    from pliant.train.evaluation import score
    from pliant.train.processes import device_of
    from pliant.train.run import read_division

    data = load_data(run.recipe, read_division(run.folder))
    device = device_of(run.recipe)

    def scored(part: Literal["check", "val", "test"]) -> Evaluation:
        return score(network, data.batches(part, device), data.classes, device=device)

    check, val = scored("check"), scored("val")
    test = None if data.test is None else scored("test").top1
    network.cpu()
    row = run.history[run.best_epoch] | {
        "train_accuracy": check.top1,
        "train_ce": check.loss,
        "val_accuracy": val.top1,
        "val_loss": val.loss,
        "gap": check.top1 - val.top1,
    }
    return replace(
        run, model=network, history=[row], best_epoch=0, val_accuracy=val.top1, test_accuracy=test
    )


def run_folder(folder: str | Path, label: str, recipe: Recipe) -> Path:
    """Where `compare` puts a run.

    Example:
        >>> run_folder("runs", "MoD, score order", Recipe(name="a", model="m", seed=2)).as_posix()
        'runs/mod-score-order-s2'
    """
    words = re.findall(r"[^\W_]+", label.lower())
    return Path(folder, f"{'-'.join(words)}-s{recipe.seed}")


def _score(label: str, run: Run) -> Score:
    """What a run cost and reached."""
    from pliant.counting import count_macs, count_parameters
    from pliant.train.run import ENVIRONMENT

    recipe, best = run.recipe, run.history[run.best_epoch]
    # Where it was trained, which is not always here and now.
    origin = json.loads((run.folder / ENVIRONMENT).read_text(encoding="utf-8"))
    return Score(
        label=label,
        recipe=recipe.name,
        model=recipe.model,
        model_args=json.dumps(dict(recipe.model_args)),
        data=recipe.data,
        pixels=recipe.pixels,
        epochs=recipe.epochs,
        seed=recipe.seed,
        parameters=count_parameters(run.model),
        macs=count_macs(run.model, (recipe.in_chans, recipe.pixels, recipe.pixels)),
        train_accuracy=best["train_accuracy"],
        train_ce=best["train_ce"],
        val_accuracy=best["val_accuracy"],
        gap=best["train_accuracy"] - best["val_accuracy"],
        test_accuracy=run.test_accuracy,
        seconds=run.seconds,
        **origin,
    )


def write_scores(path: str | Path, scores: Iterable[Score], append: bool = False) -> None:
    """Write scores to a CSV file, as `pliant.records.write_records`."""
    write_records(path, Score, scores, append=append, number=".4f", called="scores")


def read_scores(path: str | Path) -> list[Score]:
    """Scores that `write_scores` wrote, as `pliant.records.read_records`."""
    return read_records(path, Score, called="scores")


HEADINGS = (
    "network",
    "test, %",
    "validation, %",
    "train CE",
    "gap, points",
    "parameters",
    "MACs",
    "training, s",
)


def summary(scores: Sequence[Score]) -> list[tuple[str, ...]]:
    """Cells for a table with `HEADINGS`: a row for each label, seeds averaged.

    Accuracies of several seeds are given as mean ± standard deviation.
    """
    rows: list[tuple[str, ...]] = []
    for label in dict.fromkeys(score.label for score in scores):
        own = [score for score in scores if score.label == label]
        tests = [percent(score.test_accuracy) for score in own if score.test_accuracy is not None]
        first = own[0]
        rows.append(
            (
                label,
                _mean(tests, 1),
                _mean([percent(score.val_accuracy) for score in own], 1),
                _mean([score.train_ce for score in own], 3),
                _mean([percent(score.gap) for score in own], 1),
                f"{first.parameters:,}",
                f"{first.macs / 1e6:.2f} M",
                _mean([score.seconds for score in own], 0),
            )
        )
    return rows


def terminal_summary(scores: Sequence[Score]) -> Table:
    """`summary` for `rich.print`."""
    return tables.terminal(HEADINGS, summary(scores))


def _mean(values: Sequence[float], digits: int) -> str:
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"
