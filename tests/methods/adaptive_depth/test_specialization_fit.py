"""Training at both depths: options and recipes, `fit`, and weights to start from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from torch import nn
from typer.testing import CliRunner

import pliant
from _objectives import TERMS, adaptive, images
from _processes import run_script
from _runs import SMALL, StopAfter
from pliant.adaptive.scores import evaluate_depths
from pliant.checkpoint import save
from pliant.cli import app
from pliant.methods.adaptive_depth import Joint, Specialization, SwitchableNorm
from pliant.methods.adaptive_depth.depth import at_depth, set_depth, subnet
from pliant.objectives import CrossEntropy
from pliant.recipes import get_recipe, list_recipes
from pliant.train import Recipe, evaluate, fit, override, read_run
from pliant.train.objectives import make_objective
from pliant.train.tasks import Classification
from pliant.train.weights import load_weights

TINY = Recipe(
    name="tiny",
    model="resnet20_cifar_adn",
    model_args=SMALL,
    pixels=8,
    epochs=2,
    batch=128,
    augmentation="crop",
    accelerator="cpu",
    threads=1,
    lr=0.05,
    objective="specialize",
)


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0}, "alpha must be greater than 0, not 0"),
        ({"alpha": 1.0}, r"alpha must be less than 1, not 1\.0"),
        ({"alpha": "half"}, "alpha must be a valid number, not 'half'"),
        ({"alpha": True}, "alpha must be a valid number, not True"),
        ({"detach": 1}, "detach must be a valid boolean, not 1"),
        ({"logits": "no"}, "logits must be a valid boolean, not 'no'"),
        ({"positions": "all"}, "positions must be 'each' or 'pooled', not 'all'"),
        ({"stages": 2}, "stages must be a list, or none, not 2"),
        ({"stages": [0, -1]}, "stages.1 must be greater than or equal to 0, not -1"),
        ({"stages": [1, 1]}, r"stages: give each number once, not \(1, 1\)"),
        ({"stages": [True]}, "stages.0 must be a valid integer, not True"),
        ({"stages": [], "logits": False}, "nothing that trains the base network"),
        ({"weight": 0.5}, "has no option 'weight'; known: alpha, detach, stages, positions, logits"),
        ({"smoothing": 0.1}, "has no option 'smoothing'"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_objective("specialize", options)
    with pytest.raises(ValueError, match=message):
        replace(TINY, objective_args=options)


def test_objectives_by_name():
    assert make_objective("cross_entropy", {}, 0.1) == CrossEntropy(0.1)
    assert make_objective("joint", {"alpha": 0.6}, 0.1) == Joint(alpha=0.6, smoothing=0.1)
    made = make_objective("specialize", {"stages": [0, 2], "detach": False})
    assert made == Specialization(stages=(0, 2), detach=False)
    with pytest.raises(ValueError, match="no objective 'mse'; there are cross_entropy, joint, specialize"):
        make_objective("mse", {})
    with pytest.raises(ValueError, match="'cross_entropy' has no option 'alpha'; known: none"):
        replace(TINY, objective="cross_entropy", objective_args={"alpha": 0.5})
    with pytest.raises(ValueError, match="'joint' has no option 'detach'; known: alpha"):
        make_objective("joint", {"detach": False})
    with pytest.raises(ValueError, match="no objective 'mse'; there are cross_entropy, joint, specialize"):
        replace(TINY, objective="mse")


def test_recipes_carry_the_objective():
    changed = override(TINY, ["objective_args.alpha=0.7", "objective_args.stages=(1, 2)"])
    assert changed.objective_args == {"alpha": 0.7, "stages": [1, 2]}
    assert Recipe.from_dict(changed.as_dict()) == changed
    joint = override(TINY, ["objective=joint", "objective_args.alpha=0.4"])
    assert (joint.objective, joint.objective_args) == ("joint", {"alpha": 0.4})
    with pytest.raises(
        ValueError, match=r"objective_args takes one argument .* objective_args\.alpha=0\.5"
    ):
        override(TINY, ["objective_args=0.5"])


def test_recipes_of_adaptive_networks():
    names = [name for name in list_recipes() if "_adn" in name]
    assert names
    for name in names:
        recipe = get_recipe(name)
        joint = name.endswith(("ablation-neither", "ablation-norms"))
        assert recipe.objective == ("joint" if joint else "specialize"), name
    assert get_recipe("cifar10.resnet20").objective == "cross_entropy"
    paper = get_recipe("imagenet.resnet50_adn.paper")
    plain = get_recipe("imagenet.resnet50.adn")
    assert (paper.epochs, paper.batch, paper.lr, paper.objective_args) == (150, 256, 0.1, {})
    assert "Ours" in paper.note
    same = replace(paper, name=plain.name, model=plain.model, objective="cross_entropy")
    assert same == plain  # the individual network, trained alike


def test_table_3_is_four_recipes():
    forms = {}
    for form in ("neither", "norms", "specialization", "both"):
        recipe = get_recipe(f"imagenet.resnet50_adn.ablation-{form}")
        forms[form] = (recipe.objective, recipe.model_args.get("switchable_norms", True))
    assert forms == {
        "neither": ("joint", False),
        "norms": ("joint", True),
        "specialization": ("specialize", False),
        "both": ("specialize", True),
    }
    both, paper = (
        get_recipe("imagenet.resnet50_adn.ablation-both"),
        get_recipe("imagenet.resnet50_adn.paper"),
    )
    assert replace(both, name=paper.name) == paper
    with pytest.raises(ValueError, match="of networks of AdaptiveDepth, not of 'resnet50'"):
        get_recipe("imagenet.resnet50.ablation-both")


# --- fit ------------------------------------------------------------------------------------------


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return fit(TINY, tmp_path_factory.mktemp("runs") / "tiny", progress=False)


def test_the_history_has_every_term_and_both_accuracies(tiny):
    for row in tiny.history:
        terms = [row[f"train_{name}"] for name in TERMS]
        assert all(t > 0 for t in terms)
        assert row["train_loss"] == pytest.approx(sum(terms))
    assert tiny.history[1]["train_cross_entropy"] < tiny.history[0]["train_cross_entropy"]
    for skip, name in (((False,) * 3, "val_accuracy"), ((True,) * 3, "val_accuracy_base")):
        with at_depth(tiny.model, skip):
            saved = subnet(tiny.model, skip)
        score = evaluate(save_plain(saved), "digits", part="val", device="cpu", pixels=8)
        assert score.top1 == pytest.approx(tiny.history[tiny.best_epoch][name])
    assert "val_accuracy_base" in (tiny.folder / "metrics.csv").read_text().splitlines()[0]
    assert tiny.val_accuracy == tiny.history[tiny.best_epoch]["val_accuracy"]
    assert pliant.get_depth(tiny.model) == (False,) * 3


def save_plain(network):
    """A network whose images `evaluate` prepares as digits: mean and deviation from the data."""
    vars(network)["pretrained_cfg"] = {"input_size": (1, 8, 8)}
    return network


def test_val_loss_is_the_objective_on_validation_images(tiny):
    from pliant.train.data import load_data

    batches = list(load_data(TINY).batches("val"))
    objective = Specialization()
    losses = []
    with torch.no_grad():
        for x, y in batches:
            terms = objective(objective.run(tiny.model, x), y)
            losses += [float(sum(terms.values()))] * len(y)
    assert sum(losses) / len(losses) == pytest.approx(tiny.history[tiny.best_epoch]["val_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "best"),
    [([], 1), (["objective=joint"], 1), (["model=resnet20_cifar", "objective=cross_entropy"], 0)],
)
def test_the_best_epoch_is_that_of_both_depths_where_both_are_trained(tmp_path, monkeypatch, changes, best):
    """As after a start from trained weights: the whole network falls a little, its base rises."""
    whole, base = (0.95, 0.94, 0.90), (0.20, 0.80, 0.81)
    ended = Classification.on_validation_epoch_end

    def end(self):
        ended(self)
        row = self.history[-1]
        told = {"val_accuracy": whole[row["epoch"]], "val_accuracy_base": base[row["epoch"]]}
        row.update({name: value for name, value in told.items() if name in row})

    monkeypatch.setattr(Classification, "on_validation_epoch_end", end)
    run = fit(override(TINY, ["epochs=3", "warmup=0", *changes]), tmp_path / "run", progress=False)
    assert run.best_epoch == best


def test_a_resumed_run_ends_in_the_same_bits(tiny, tmp_path):
    with pytest.raises(KeyError, match="killed"):
        fit(TINY, tmp_path / "run", progress=False, callbacks=[StopAfter(1)])
    resumed = fit(TINY, tmp_path / "run", resume=True, progress=False)
    assert same(resumed.model.state_dict(), tiny.model.state_dict())
    assert [r["val_accuracy_base"] for r in resumed.history] == [
        r["val_accuracy_base"] for r in tiny.history
    ]


@pytest.mark.parametrize(
    "changes",
    [
        ["objective=joint"],
        ["objective_args.positions=pooled", "precision=bf16", "channels_last=true", "ema=0.9"],
        ["objective_args.detach=false", "mixup=0.2", "model_args.switchable_norms=false"],
        ["objective_args.stages=(2,)", "objective_args.logits=false", "smoothing=0.1"],
    ],
    ids=["joint", "pooled, bf16, ema", "both ways, mixup", "last stage"],
)
def test_options_run_and_change_what_is_learnt(tiny, changes, tmp_path):
    run = fit(override(TINY, ["epochs=1", *changes]), tmp_path / "run", progress=False)
    row = run.history[0]
    assert row["train_loss"] != pytest.approx(tiny.history[0]["train_loss"], rel=1e-3)
    assert 0 <= row["val_accuracy_base"] <= 1
    terms = {name for name in row if name.startswith(("train_kl", "train_cross"))}
    if "objective=joint" in changes:
        assert terms == {"train_cross_entropy", "train_cross_entropy_base"}
    elif "objective_args.logits=false" in changes:
        assert terms == {"train_cross_entropy", "train_kl_stage2"}
    else:
        assert terms == {f"train_{name}" for name in TERMS}


def test_a_converted_network_of_ones_own_and_an_objective_of_ones_own(tmp_path):
    plain = timm.create_model("resnet20_cifar", in_chans=1, num_classes=10)
    model = pliant.convert(plain, pliant.AdaptiveDepth(skippable=(0, 2, 1)))
    run = fit(
        replace(TINY, epochs=1, objective="cross_entropy"),
        tmp_path / "run",
        model=model,
        objective=Specialization(alpha=0.6),
        progress=False,
    )
    assert set(run.history[0]) >= {"train_kl_stage0", "train_kl_stage1", "val_accuracy_base"}
    assert "train_kl_stage2" not in run.history[0]
    assert len(pliant.get_depth(read_run(run.folder).model)) == 2


def test_networks_that_cannot_be_specialised_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="convert it by AdaptiveDepth"):
        fit(override(TINY, ["model=resnet20_cifar"]), tmp_path / "a", progress=False)
    with pytest.raises(ValueError, match="no stage 3; the stages that can skip are 0 to 2"):
        fit(override(TINY, ["objective_args.stages=(3,)"]), tmp_path / "b", progress=False)
    with pytest.raises(ValueError, match="do not train the base network's last stage; add stage 2"):
        fit(
            override(TINY, ["objective_args.stages=(0,)", "objective_args.logits=false"]),
            tmp_path / "c",
            progress=False,
        )
    model = adaptive(in_chans=1)
    set_depth(model, (False, False, True))
    with pytest.raises(ValueError, match=r"first set it to the whole network: .*\(False, False, False\)"):
        fit(TINY, tmp_path / "d", model=model, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_command_tells_both_accuracies(tmp_path):
    changes = ["epochs=1", "pixels=8", "batch=256", "warmup=0", "accelerator=cpu"]
    command = ["train", "digits.resnet20_adn", *changes, "--no-progress", "--folder", str(tmp_path / "run")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    row = read_run(tmp_path / "run").history[0]
    assert f"best epoch 1: validation {100 * row['val_accuracy']:.2f} %" in done.output
    assert f"base network: validation {100 * row['val_accuracy_base']:.2f} %" in done.output


def test_training_one_depth_of_an_adaptive_network_is_told(tmp_path, caplog):
    recipe = override(TINY, ["epochs=1", "objective=cross_entropy"])
    run = fit(recipe, tmp_path / "run", progress=False)
    assert "CrossEntropy does not train all of this network" in caplog.text
    assert "val_accuracy_base" not in run.history[0]


@pytest.mark.slow
def test_two_processes_train_without_a_search_for_unused_parameters(tmp_path):
    script = """
import os, sys
from pliant.train import fit, Recipe
if __name__ == "__main__":
    recipe = Recipe(name="d", model="resnet20_cifar_adn", pixels=8, epochs=2, devices=2, strategy="ddp",
                    accelerator="cpu", threads=1, objective="specialize")
    run = fit(recipe, sys.argv[1], progress=False)
    row = run.history[-1]
    print(f"{os.environ['LOCAL_RANK']} {row['val_accuracy']} {row['val_accuracy_base']} "
          f"{row['train_loss']}", flush=True)
"""
    said = run_script(script, tmp_path)
    assert said["0"] == said["1"]
    run = read_run(tmp_path / "run")
    held_out = evaluate(run.folder, part="val", device="cpu")
    assert held_out.top1 == pytest.approx(run.val_accuracy)


@pytest.mark.slow
def test_digits_are_learnt_at_both_depths(tmp_path):
    """And the six that were never trained follow, as the paper says of its fourteen."""
    recipe = override(get_recipe("digits.resnet20_adn"), ["accelerator=cpu"])
    run = fit(recipe, tmp_path / "run", progress=False)
    scores = evaluate_depths(run.folder, device="cpu")
    assert scores[0].top1 == pytest.approx(run.test_accuracy)
    assert [s.top1 > 0.95 for s in scores if s.role] == [True, True]
    assert min(s.top1 for s in scores) > 0.85


# --- weights to start from ------------------------------------------------------------------------


def test_a_trained_plain_network_starts_its_adaptive_form(tmp_path):
    plain = timm.create_model("resnet20_cifar").eval()
    nn.init.normal_(plain.layer1[0].bn1.running_mean)
    for place in (save(plain, tmp_path / "net"), tmp_path / "net.th"):
        if place.suffix:
            torch.save({"state_dict": {f"module.{k}": v for k, v in plain.state_dict().items()}}, place)
        model = adaptive().eval()
        load_weights(model, place)
        x = images(2)
        with torch.no_grad():
            assert torch.equal(model(x), plain(x))
        pairs = [m for m in model.modules() if isinstance(m, SwitchableNorm)]
        assert all(same(m.full.state_dict(), m.base.state_dict()) for m in pairs)
        norm = model.layer1[0].block.bn1
        assert norm.base.weight.data_ptr() != norm.full.weight.data_ptr()
    other = adaptive().eval()
    load_weights(other, save(model, tmp_path / "adn"))  # and a network of its own kind
    assert same(other.state_dict(), model.state_dict())


def test_weights_that_do_not_fit_are_refused(tmp_path):
    wider = save(timm.create_model("resnet20_cifar", num_classes=7), tmp_path / "seven")
    for model in (adaptive(), timm.create_model("resnet20_cifar")):
        with pytest.raises(ValueError, match="do not fit ResNet"):
            load_weights(model, wider, new_classifier=False)
    with pytest.raises(FileNotFoundError, match="no folder and no file of weights"):
        load_weights(adaptive(), tmp_path / "none.pt")
    (tmp_path / "torn.safetensors").write_bytes(b"12")
    with pytest.raises(ValueError, match=r"torn\.safetensors is no file of weights"):
        load_weights(adaptive(), tmp_path / "torn.safetensors")
    named = save(timm.create_model("resnet20_cifar"), tmp_path / "named", classes=tuple("abcdefghij"))
    with pytest.raises(ValueError, match=r"for the classes a, b, c, d, e and 5 more; the data's are 0, 1"):
        load_weights(adaptive(), named, classes=tuple("0123456789"))
    load_weights(adaptive(), named, classes=tuple("abcdefghij"))


def test_another_normalisation_is_told(tmp_path, caplog):
    place = save(timm.create_model("resnet20_cifar"), tmp_path / "net", mean=(0.5,) * 3, std=(0.2,) * 3)
    load_weights(adaptive(), place, mean=(0.5,) * 3, std=(0.2,) * 3)
    assert not caplog.records
    load_weights(adaptive(), place, mean=(0.5, 0.5, 0.4), std=(0.2,) * 3)
    assert "another mean" in caplog.text
    assert "another std" not in caplog.text


def test_fit_starts_from_weights_and_goes_on_without_them(tiny, tmp_path):
    recipe = replace(TINY, weights=tiny.folder, lr=1e-9, warmup=0.0, augmentation="none")
    with pytest.raises(KeyError, match="killed"):
        fit(recipe, tmp_path / "run", progress=False, callbacks=[StopAfter(1)])
    elsewhere = tiny.folder.rename(tiny.folder.with_name("moved"))
    try:
        run = fit(recipe, tmp_path / "run", resume=True, progress=False)
    finally:
        elsewhere.rename(tiny.folder)
    for name, p in run.model.named_parameters():
        assert torch.allclose(p, tiny.model.get_parameter(name), atol=1e-6), name
    fresh = fit(replace(recipe, weights=None, epochs=1), tmp_path / "fresh", progress=False)
    assert fresh.history[0]["train_cross_entropy"] > run.history[0]["train_cross_entropy"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fit(replace(recipe, weights="nowhere"), tmp_path / "none", progress=False)
    assert not (tmp_path / "none").exists()
