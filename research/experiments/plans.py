"""What an experiment is: planned training runs, the most important first."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pliant.compare import PLAIN, Score, controls_by_name
from pliant.methods.adaptive_depth import AdaptiveDepth
from pliant.methods.adaptive_depth.recipes import BASE_ALONE
from pliant.methods.mixture_of_depths.recipes import REMOVED
from pliant.models._build import methods_of
from pliant.train.recipe import WHERE, Accelerator, Recipe, override
from research.experiments.variants import FIRST, SCORE_ORDER, VARIANTS

# What a row is known by: label, recipe, network, its arguments, seed, epochs.
Key = tuple[str, str, str, str, int, int]

# Families of runs, and what the page calls them, in its order.
FAMILIES = {
    "controls": "Selection and its controls",
    "variants": "Variants",
    "sweep": "Width of the block and where its output goes (Table 9)",
    "depth": "Plain networks of other depths",
    "adn": "Adaptive depth against networks trained alone",
    "condconv": "CondConv",
    "combinations": "Two methods at once",
}
SUPER, BASE = "super-net", "base-net"
SEEDS = 3  # for an interval; other runs have one seed, and the page says so
# Plain networks of other depths, in blocks of each stage: the baselines at equal time. Two lie between the
# network without Mixture-of-Depths blocks and the plain one; one lacks all that ``blocks="all"`` replaces.
DEPTHS = {
    f"plain, {'-'.join(map(str, blocks))} blocks": blocks for blocks in ((3, 2, 2), (3, 3, 2), (1, 1, 1))
}
# Baselines of the variants. They have a seed more than the rest, because a variant's first seed chose it
# and the next three decide.
BASELINES = (PLAIN, REMOVED, SCORE_ORDER, FIRST, *DEPTHS)
_OF_VARIANTS = "resnet20"
CONTROLS, CLOSED = "cifar10-controls", "cifar10-variants"
# Devices that experiments run on, and what Lightning calls them.
DEVICES: dict[str, Accelerator] = {"cpu": "cpu", "cuda": "gpu"}


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One training run of an experiment.

    Attributes:
        network: short name of the plain network; labels are unique within one.
        family: one of `FAMILIES`.
        label: the network's role.
        recipe: what is run, seed and epochs included.
    """

    network: str
    family: str
    label: str
    recipe: Recipe

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of its rows: an adaptive network has one for each depth that is trained."""
        if AdaptiveDepth in methods_of(self.recipe.model):
            return f"{self.label}, {SUPER}", f"{self.label}, {BASE}"
        return (self.label,)

    @property
    def keys(self) -> tuple[Key, ...]:
        """What its rows are known by."""
        r = self.recipe
        arguments = json.dumps(dict(r.model_args), sort_keys=True)
        return tuple((label, r.name, r.model, arguments, r.seed, r.epochs) for label in self.labels)

    def changed(self, *, epochs: int | None = None, where: Iterable[str] = ()) -> PlannedRun:
        """The same run for another number of epochs, or elsewhere.

        Args:
            epochs: None leaves them. The warm-up takes at most a quarter of them.
            where: ``key=value`` changes of what says where a run takes place (`WHERE`).

        Raises:
            ValueError: a change of what is run. Rows would not tell it from the experiment's.
        """
        where = list(where)
        for change in where:
            if (name := change.partition("=")[0].strip()) not in WHERE:
                raise ValueError(
                    f"{name} belongs to the experiment, whose rows do not say it; what can be changed "
                    f"is where it runs: {', '.join(WHERE)}. `pliant compare` takes every change"
                )
        recipe = override(self.recipe, where)
        if epochs is not None:
            if epochs < 1:
                raise ValueError(f"epochs must be at least 1, not {epochs}")
            recipe = replace(recipe, epochs=epochs, warmup=min(recipe.warmup, epochs / 4))
        return replace(self, recipe=recipe)


def key_of(score: Score) -> Key:
    """What a row is known by, as `PlannedRun.keys` has it."""
    arguments = json.dumps(json.loads(score.model_args), sort_keys=True)
    return score.label, score.recipe, score.model, arguments, score.seed, score.epochs


def cifar10_controls(device: str = "cpu") -> list[PlannedRun]:
    """CIFAR-10 with one recipe: each method beside its baselines and controls.

    ResNet-20 (c = 16, the width of its first block); on a GPU also ResNet-18 and ResNet-50 in CIFAR
    form (c = 64). First one seed of all controls of Mixture-of-Depths, then two further seeds, and
    those of plain networks of other depths, so that the question is answered as early as it can be;
    then one seed of everything else, and what the variants need.

    Raises:
        ValueError: another device.

    Example:
        >>> runs = cifar10_controls()
        >>> runs[0].label, runs[0].recipe.name, runs[0].recipe.epochs
        ('plain', 'cifar10.resnet20.controls', 12)
        >>> sum(run.family == "controls" and run.recipe.seed < 3 for run in runs)
        21
    """
    accelerator = _accelerator(device)
    networks: dict[str, tuple[int, ...]] = {"resnet20": (2, 4, 8, 16)}
    if device == "cuda":
        networks |= {"resnet18": (8, 16, 32, 64), "resnet50": ()}
    parts = {name: _families(name, widths) for name, widths in networks.items()}
    order = [(family, seed) for family in ("controls", "depth") for seed in range(SEEDS)]
    order += [(family, 0) for family in ("sweep", "adn", "condconv", "combinations")]
    order += [("adn", seed) for seed in range(1, SEEDS)]
    order += [(family, SEEDS) for family in ("controls", "depth")]
    return [
        PlannedRun(
            network=network,
            family=family,
            label=label,
            recipe=replace(recipe, seed=seed, accelerator=accelerator),
        )
        for family, seed in order
        for network, families in parts.items()
        for label, recipe in families.get(family, {}).items()
        if seed < SEEDS or (label in BASELINES and network == _OF_VARIANTS)
    ]


def _accelerator(device: str) -> Accelerator:
    """Lightning's name of a device.

    Raises:
        ValueError: no experiment runs there.
    """
    if device not in DEVICES:
        raise ValueError(f"no runs are planned for device {device!r}; take one of {', '.join(DEVICES)}")
    return DEVICES[device]


def _families(network: str, widths: tuple[int, ...]) -> dict[str, dict[str, Recipe]]:
    """Recipes of a network by family and label; `widths` are the c of the sweep."""
    name = f"cifar10.{network}.controls"
    found = {"controls": controls_by_name(name)}
    plain, mod = found["controls"][PLAIN], found["controls"]["MoD, score order"]
    condconv = controls_by_name(name, (), "condconv")
    adaptive = controls_by_name(name, (), "adn")
    found["condconv"] = {k: r for k, r in condconv.items() if k != PLAIN}
    found["adn"] = {k: adaptive[k] for k in (BASE_ALONE, "ADN")}

    def args(recipe: Recipe, **options: Any) -> Recipe:
        return replace(recipe, model_args={**recipe.model_args, **options})

    # At the widest, output to the first channels is the control "MoD, score order".
    first = {f"MoD, c = {c}": args(mod, c=c) for c in widths[:-1]}
    original = {f"MoD, c = {c}, original": args(mod, c=c, fusion="original") for c in widths}
    found["sweep"] = first | original
    if network == _OF_VARIANTS:
        found["combinations"] = _combinations(plain)
        found["depth"] = {label: args(plain, layers=list(blocks)) for label, blocks in DEPTHS.items()}
    return found


def _combinations(plain: Recipe) -> dict[str, Recipe]:
    """Pairs of methods, in the one order in which each is possible."""
    from pliant.recipes import get_recipe

    data, network, form = plain.name.split(".")
    four = {"experts": 4}
    pairs: Mapping[str, tuple[str, dict[str, Any]]] = {
        "MoD + ADN": ("mod_adn", {}),
        "MoD + CondConv, 4 experts": ("mod_cc", four),
        "CondConv, 4 experts + ADN": ("cc_adn", four),
    }
    return {
        label: replace(get_recipe(f"{data}.{network}_{ending}.{form}"), model_args=options)
        for label, (ending, options) in pairs.items()
    }


def cifar10_variants(device: str = "cpu") -> list[PlannedRun]:
    """Variants of Mixture-of-Depths, by the recipe and for the first network of `cifar10_controls`.

    The study is closed: most of these networks can no longer be built, and the runs stand here only so
    that their rows are known.

    Raises:
        ValueError: another device.

    Example:
        >>> runs = cifar10_variants()
        >>> runs[0].label, runs[0].recipe.model_args
        ('gate of the map', {'gate': 'map'})
    """
    accelerator = _accelerator(device)
    mod = controls_by_name(f"cifar10.{_OF_VARIANTS}.controls")[SCORE_ORDER]
    return [
        PlannedRun(
            network=_OF_VARIANTS,
            family="variants",
            label=label,
            recipe=replace(
                mod,
                model_args={**mod.model_args, **variant.options},
                seed=seed,
                accelerator=accelerator,
            ),
        )
        for seed in range(SEEDS + 1)
        for label, variant in VARIANTS.items()
    ]


# Experiments that can be run, by name: their runs on a device.
EXPERIMENTS: dict[str, Callable[[str], list[PlannedRun]]] = {CONTROLS: cifar10_controls}


def variants_and_baselines(device: str = "cpu") -> list[PlannedRun]:
    """Runs of the closed study of variants, behind those of the controls that are its baselines.

    Example:
        >>> list(dict.fromkeys(run.label for run in variants_and_baselines()))[:4]
        ['plain', 'MoD, score order', 'first k channels', 'blocks removed']
    """
    baselines = planned_runs(CONTROLS, device, only=BASELINES, networks=[_OF_VARIANTS])
    return [*baselines, *cifar10_variants(device)]


def planned_runs(
    name: str,
    device: str = "cpu",
    *,
    only: Iterable[str] = (),
    networks: Iterable[str] = (),
    seeds: int | None = None,
    epochs: int | None = None,
    where: Iterable[str] = (),
) -> list[PlannedRun]:
    """Runs of an experiment, all or some.

    Args:
        name: of `EXPERIMENTS`.
        device: ``cpu`` or ``cuda``.
        only: labels; none: all.
        networks: short names of plain networks; none: all.
        seeds: the first so many of each label.
        epochs: in place of the experiment's.
        where: changes of where they run, as for `PlannedRun.changed`.

    Raises:
        ValueError: no such experiment, device, label or network, no label of that network, a closed
            study, or a change that is refused.

    Example:
        >>> [run.recipe.seed for run in planned_runs("cifar10-controls", only=["plain"], seeds=2)]
        [0, 1]
    """
    if name == CLOSED:
        raise ValueError(
            f"{CLOSED} is a closed study: its code is at the git tag before-house, and here its page alone "
            f"can be written (--page)"
        )
    if name not in EXPERIMENTS:
        raise ValueError(f"no experiment {name!r}; there are {', '.join(EXPERIMENTS)}")
    if seeds is not None and seeds < 1:
        raise ValueError(f"seeds must be at least 1, not {seeds}")
    where, runs = list(where), EXPERIMENTS[name](device)
    wanted = _known("label", only, [run.label for run in runs])
    of = _known("network", networks, [run.network for run in runs])
    first: dict[tuple[str, str], int] = {}
    chosen = []
    for run in runs:
        start = first.setdefault((run.network, run.label), run.recipe.seed)
        if run.label in wanted and run.network in of and (seeds is None or run.recipe.seed < start + seeds):
            chosen.append(run.changed(epochs=epochs, where=where))
    if not chosen:
        labels = dict.fromkeys(run.label for run in runs if run.network in of)
        raise ValueError(
            f"no run of {', '.join(sorted(of))} has the label {', '.join(sorted(wanted))}; its labels are "
            f"{'; '.join(labels)}"
        )
    return chosen


def _known(what: str, wanted: Iterable[str], there: Iterable[str]) -> set[str]:
    """What is wanted; all that is there where nothing is named.

    Raises:
        ValueError: something else is named.
    """
    named, names = set(wanted), list(dict.fromkeys(there))
    if unknown := sorted(named - set(names)):
        raise ValueError(f"no {what} {unknown[0]!r}; the {what}s are {'; '.join(names)}")
    return named or set(names)
