"""Training side by side: the controls, the scores, and what is kept of them."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest
import timm

from pliant import AdaptiveDepth, convert, get_depth, subnet
from pliant.adaptive.scores import evaluate_depths
from pliant.compare import (
    PLAIN,
    Score,
    compare,
    controls,
    controls_by_name,
    summary,
    terminal_summary,
    write_scores,
)
from pliant.counting import count_parameters
from pliant.methods.adaptive_depth.method import base_arguments
from pliant.methods.adaptive_depth.recipes import BASE_ALONE
from pliant.methods.adaptive_depth.switch import Depth
from pliant.methods.condconv.recipes import ABLATIONS
from pliant.methods.mixture_of_depths.recipes import CONTROLS as MOD_CONTROLS
from pliant.methods.mixture_of_depths.recipes import REMOVED
from pliant.train.recipe import Recipe, override
from research.quickstart import last_stages_first

TINY = Recipe(
    name="tiny", model="resnet20_cifar", pixels=8, epochs=1, batch=256, workers=0, accelerator="cpu"
)
MOD = replace(TINY, model="resnet20_cifar_mod")
SCORE = Score(
    label="a",
    recipe="r",
    model="m",
    model_args="{}",
    data="digits",
    pixels=8,
    epochs=1,
    seed=0,
    parameters=1234,
    macs=2_000_000,
    train_accuracy=0.9,
    val_accuracy=0.8,
    train_ce=0.5,
    gap=0.1,
    test_accuracy=0.7,
    seconds=3.0,
)


def test_controls_change_the_network_and_nothing_else():
    plain = override(TINY, ["model_args.drop_rate=0.1", "seed=3"])
    recipes = controls(plain, replace(plain, model="resnet20_cifar_mod"), MOD_CONTROLS)
    assert list(recipes) == [PLAIN, *MOD_CONTROLS]
    assert recipes[PLAIN].model == "resnet20_cifar"
    assert recipes[REMOVED].model == "resnet20_cifar_mod"
    assert recipes[REMOVED].model_args == {"drop_rate": 0.1, "selection": "none"}
    assert recipes["MoD, index order"].model_args == {"drop_rate": 0.1, "order": "index"}
    for recipe in recipes.values():
        assert replace(recipe, model="x", model_args={}) == replace(TINY, model="x", model_args={}, seed=3)


def test_an_unfair_comparison_is_refused():
    with pytest.raises(ValueError, match=r"differ in epochs \(1 and 2\)"):
        controls(TINY, replace(MOD, epochs=2), MOD_CONTROLS)


def test_controls_by_name_change_both_and_keep_what_the_form_needs():
    recipes = controls_by_name("digits.resnet18", ["epochs=2"])
    assert {recipe.epochs for recipe in recipes.values()} == {2}
    assert "reduction" not in recipes[PLAIN].model_args
    assert recipes["MoD, index order"].model_args["reduction"] == 4
    assert controls_by_name("cifar10.resnet50.paper")[REMOVED].model == "resnet50_cifar_mod"
    with pytest.raises(ValueError, match="no recipe"):
        controls_by_name("digits.resnet18_mod")


def test_compare_trains_scores_and_reads_finished_runs_again(tmp_path):
    recipes = {k: v for k, v in controls(TINY, MOD, MOD_CONTROLS).items() if k in (PLAIN, REMOVED)}
    seen = []
    first = compare(recipes, tmp_path, progress=False, started=lambda label, _: seen.append(label))
    assert seen == [PLAIN, REMOVED]
    plain, removed = (first[label][0] for label in recipes)
    assert removed.parameters < plain.parameters == 269_434  # one input channel
    assert removed.macs < plain.macs
    assert plain.test_accuracy == pytest.approx(first[PLAIN][1].test_accuracy)
    assert plain.gap == pytest.approx(plain.train_accuracy - plain.val_accuracy)
    assert plain.torch
    assert plain.date

    stamp = (tmp_path / "plain-s0" / "run.json").stat().st_mtime_ns
    again = compare(recipes, tmp_path, progress=False)
    assert (tmp_path / "plain-s0" / "run.json").stat().st_mtime_ns == stamp
    assert again[PLAIN][0] == plain  # its date, too, is that of the training
    for scores in (first, again):
        write_scores(tmp_path / "scores.csv", [score for score, _ in scores.values()], append=True)
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert [row["label"] for row in rows] == [PLAIN, REMOVED]
    assert rows[0]["date"] == json.loads((tmp_path / "plain-s0" / "environment.json").read_text())["date"]


def test_scores_are_written_appended_and_foreign_files_refused(tmp_path):
    path = tmp_path / "deep" / "scores.csv"
    write_scores(path, [SCORE])
    write_scores(path, [replace(SCORE, seed=1, test_accuracy=None)], append=True)
    rows = list(csv.DictReader(path.open()))
    assert [row["seed"] for row in rows] == ["0", "1"]
    assert [row["test_accuracy"] for row in rows] == ["70.0000", ""]
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"other\.csv has the columns \['a', 'b'\]"):
        write_scores(other, [SCORE], append=True)
    assert other.read_text() == "a,b\n1,2\n"


def test_summary_averages_seeds():
    rows = summary([SCORE, replace(SCORE, seed=1, test_accuracy=0.74), replace(SCORE, label="b")])
    assert rows[0] == (
        "a",
        "72.0 ± 2.8",
        "80.0 ± 0.0",
        "0.500 ± 0.000",
        "10.0 ± 0.0",
        "1,234",
        "2.00 M",
        "3 ± 0",
    )
    assert rows[1][:2] == ("b", "70.0")
    assert terminal_summary([SCORE]).row_count == 1
    assert summary([replace(SCORE, test_accuracy=None)])[0][1] == "-"


def test_condconv_is_compared_with_its_plain_network():
    recipes = controls_by_name("cifar10.mobilenetv1_w025", ["epochs=4"], "condconv")
    assert {label: (r.model, r.model_args) for label, r in recipes.items()} == {
        PLAIN: ("mobilenetv1_w025_cifar", {}),
        "CondConv, 4 experts": ("cc_mobilenetv1_025_cifar", {"experts": 4}),
        "CondConv, 8 experts": ("cc_mobilenetv1_025_cifar", {"experts": 8}),
    }
    assert {r.epochs for r in recipes.values()} == {4}
    ablations = controls_by_name("cifar10.mobilenetv1_w025", (), "condconv-ablations")
    assert list(ablations) == [PLAIN, "CondConv", *ABLATIONS]
    assert ablations["softmax"].model_args == {"activation": "softmax"}
    with pytest.raises(ValueError, match="no comparison for 'snow'; there is one for mod, condconv"):
        controls_by_name("cifar10.resnet20", (), "snow")


def test_adaptive_depth_is_compared_with_both_networks_trained_alone():
    recipes = controls_by_name("cifar10.resnet56", ["epochs=4"], "adn")
    assert {label: (r.model, r.model_args, r.objective) for label, r in recipes.items()} == {
        PLAIN: ("resnet56_cifar", {}, "cross_entropy"),
        BASE_ALONE: ("resnet56_cifar", {"layers": [5, 5, 5]}, "cross_entropy"),
        "ADN": ("resnet56_cifar_adn", {}, "specialize"),
    }
    for r in recipes.values():
        network = {"name": "x", "model": "x", "model_args": {}, "objective": "cross_entropy"}
        assert replace(r, **network) == replace(recipes[PLAIN], **network)
    with pytest.raises(ValueError, match="differ in smoothing"):
        controls(recipes[PLAIN], replace(recipes["ADN"], smoothing=0.3), {})


@pytest.mark.parametrize(
    ("name", "arguments", "parameters"),
    [
        ("resnet50", {"layers": [2, 2, 3, 2]}, 17_112_360),
        ("convnext_atto", {"depths": [1, 1, 3, 1]}, None),
        ("deit_tiny_patch16_224", {"depth": 8}, None),
    ],
)
def test_the_base_networks_depth_as_arguments(name, arguments, parameters):
    assert base_arguments(name, {"num_classes": 1000}) == {"num_classes": 1000, **arguments}
    alone = timm.create_model(name, **arguments)
    network = convert(timm.create_model(name), AdaptiveDepth())
    cut = subnet(network, (True,) * len(get_depth(network)))
    assert count_parameters(alone) == count_parameters(cut) == (parameters or count_parameters(cut))


def test_a_network_without_an_argument_of_depth_says_so():
    with pytest.raises(ValueError, match="regnetx_002 has no argument that gives it"):
        base_arguments("regnetx_002", {})


def test_compare_scores_an_adaptive_network_at_its_depths(tmp_path):
    recipe = replace(TINY, model="resnet20_cifar_adn", objective="specialize")
    done = compare({"ADN": recipe}, tmp_path, progress=False)
    assert list(done) == ["ADN, super-net", "ADN, base-net"]
    assert [p.name for p in tmp_path.iterdir()] == ["adn-s0"]
    (whole, run), (base, cut) = done.values()
    assert (whole.parameters, base.parameters) == (269_434, 172_218)
    assert base.macs < whole.macs
    assert whole.seconds == base.seconds == run.seconds
    rows = evaluate_depths(tmp_path / "adn-s0", skips=[(False,) * 3, (True,) * 3])
    assert [r.top1 for r in rows] == pytest.approx([whole.test_accuracy, base.test_accuracy])
    val = evaluate_depths(tmp_path / "adn-s0", skips=[(True,) * 3], part="val")[0]
    assert base.val_accuracy == pytest.approx(val.top1)
    assert base.gap == pytest.approx(base.train_accuracy - base.val_accuracy)
    assert not any(isinstance(m, Depth) for m in cut.model.modules())

    more = compare({"ADN": recipe}, tmp_path, progress=False, networks=last_stages_first)
    assert list(more) == ["ADN, super-net", "ADN, FFT", "ADN, FTT", "ADN, base-net"]
    assert more["ADN, base-net"][0] == base
