"""Recipes: what is refused, how they are changed, and the named ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from pliant.methods.condconv.recipes import ABLATIONS
from pliant.models import list_networks
from pliant.recipes import get_recipe, list_recipes
from pliant.train.recipe import Recipe, differences, override

BASE = {"name": "x", "model": "resnet20_cifar"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": ""}, "name must have at least 1 character, not ''"),
        (
            {"data": "mnist"},
            "data must be 'digits', 'cifar10', 'cifar100', 'folder', 'imagenet' or 'shards', not 'mnist'",
        ),
        ({"data": "folder"}, "data=folder needs the folder of its images; give path="),
        ({"data": "folder", "path": "x", "download": True}, "cannot be downloaded"),
        ({"val_fraction": None}, "digits has no validation set of its own"),
        ({"val_fraction": 1.0}, "val_fraction must be less than 1, or none, not 1.0"),
        ({"test_fraction": 1}, "test_fraction must be less than 1, not 1"),
        ({"pixels": 0}, "pixels must be greater than or equal to 1, not 0"),
        ({"resize": 16}, "resize must be at least pixels = 32, not 16"),
        ({"epochs": 2.5}, "epochs must be a valid integer, not 2.5"),
        ({"epochs": True}, "epochs must be a valid integer, not True"),
        ({"batch": 0}, "batch must be greater than or equal to 1"),
        ({"lr": 0}, "lr must be greater than 0, not 0"),
        ({"lr": float("nan")}, "lr must be a finite number, not nan"),
        ({"clip": -1.0}, "clip must be greater than 0, or none, not -1.0"),
        ({"clip": "1"}, "clip must be a valid number, or none, not '1'"),
        ({"momentum": 1.0}, "momentum must be less than 1"),
        ({"weight_decay": -1}, "weight_decay must be greater than or equal to 0"),
        ({"smoothing": 1.0}, "smoothing must be less than 1"),
        ({"erasing": 2}, "erasing must be less than or equal to 1"),
        ({"ema": 1.0}, "ema must be less than 1, or none"),
        ({"warmup": 10}, "warmup=10.0 must be shorter than the run, which has epochs=10"),
        ({"mixup": 0.2, "batch": 33}, "batch must be even for mixup and CutMix, which pair images, not 33"),
        ({"nesterov": True, "optimizer": "adamw"}, "nesterov needs SGD with momentum, not optimizer=adamw"),
        ({"augmentation": "flips"}, "augmentation must be one of none, crop, flip_crop"),
        ({"precision": "fp16"}, "precision must be 'fp32' or 'bf16'"),
        ({"seed": -1}, "seed must be greater than or equal to 0"),
        ({"threads": 0}, "threads must be greater than or equal to 1, or none"),
        ({"unreadable": "ignore"}, "unreadable must be 'skip' or 'stop'"),
        ({"model_args": {"num_classes": 3}}, "which the data decides"),
        ({"model_args": {"block": object()}}, "model_args: .*object.* cannot be kept in a file"),
        ({"model_args": "c=3"}, "model_args must be a valid dictionary, not 'c=3'"),
        ({"lr": -1, "seed": "a"}, r"lr must be greater .*; seed must be a valid integer, not 'a'"),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**{**BASE, **values})


def test_values_are_of_their_type():
    recipe = Recipe(**BASE, lr=1, path=Path("a"), model_args={"channels": (16, 32, 64)}, val_fraction=0.5)
    assert isinstance(recipe.lr, float)
    assert recipe.path == "a"
    assert recipe.model_args == {"channels": [16, 32, 64]}
    assert recipe.in_chans == 1
    assert Recipe(**BASE, model_args={"in_chans": 3}).in_chans == 3
    assert Recipe(**BASE, data="cifar10", path="x").in_chans == 3


def test_json_and_back():
    recipe = Recipe(**BASE, model_args={"c": 4}, clip=1.0)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.as_dict()))) == recipe
    with pytest.raises(ValueError, match=r"no option 'epoch'; did you mean epochs\?"):
        Recipe.from_dict({**BASE, "epoch": 3})
    with pytest.raises(ValueError, match="needs model"):
        Recipe.from_dict({"name": "x"})


def test_overrides_are_typed():
    recipe = Recipe(**BASE, model_args={"c": 8})
    changed = override(
        recipe,
        [
            "epochs=5", "lr=1e-3", "nesterov=True", "clip=none", "ema=0.99", "optimizer=sgd", "path=a b",
            "threads=2", "model_args.c=16", "model_args.selection=none", "model_args.channels=(16, 32, 64)",
            "model_args.inner_shortcut=true", "model_args.stages=None",
        ],
    )  # fmt: skip
    assert (changed.epochs, changed.lr, changed.nesterov, changed.clip) == (5, 1e-3, True, None)
    assert (changed.ema, changed.path, changed.threads) == (0.99, "a b", 2)
    assert changed.model_args == {
        "c": 16, "selection": "none", "channels": [16, 32, 64], "inner_shortcut": True, "stages": None,
    }  # fmt: skip
    assert recipe.model_args == {"c": 8}
    assert override(recipe, []) == recipe


def test_the_size_before_the_crop_follows_the_images_unless_it_is_given():
    recipe = get_recipe("imagenet.resnet18_mod")
    assert (recipe.pixels, recipe.resize) == (176, 232)
    for changes, expected in (
        (["pixels=64"], (64, 84)),
        (["pixels=352"], (352, 464)),
        (["pixels=64", "resize=70"], (64, 70)),
        (["pixels=64", "resize=none"], (64, None)),
        (["batch=2"], (176, 232)),
    ):
        changed = override(recipe, changes)
        assert (changed.pixels, changed.resize) == expected
    assert override(get_recipe("digits.resnet18"), ["pixels=8"]).resize is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("epochs", "not of the form key=value"),
        ("epoch=3", r"did you mean epochs"),
        ("zzz=3", "known: name, model"),
        ("epochs=3.5", "epochs must be a valid integer, not '3.5'"),
        ("epochs=many", "epochs must be a valid integer, not 'many'"),
        ("clip=much", "clip must be a valid number, or none"),
        ("nesterov=perhaps", "nesterov must be a valid boolean"),
        ("data=mnist", "data must be 'digits', 'cifar10'"),
        ("epochs=0", "epochs must be greater than or equal to 1, not '0'"),
        ("model_args=c", "model_args takes one argument at a time, such as"),
        ("lr.x=3", "lr takes no argument 'x'"),
    ],
)
def test_wrong_overrides_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        override(Recipe(**BASE), [change])


def test_differences_are_listed():
    a, b = Recipe(**BASE), Recipe(**BASE, epochs=3, workers=0)
    assert differences(a, b, leaving_out=["workers"]) == ["epochs (10 and 3)"]


def test_every_listed_recipe_is_one_of_a_network_that_timm_knows():
    names = list_recipes()
    assert len(names) == len(set(names))
    for name in names:
        recipe = get_recipe(name)
        assert recipe.name == name
        assert timm.is_model(recipe.model)
        assert recipe.note


def test_every_registered_network_has_a_recipe():
    trained = {get_recipe(name).model for name in list_recipes()}
    assert set(list_networks()) <= trained
    assert get_recipe("imagenet.mobilenetv2_100").model == "mobilenetv2_100"


def test_the_papers_recipes():
    cifar = get_recipe("cifar10.resnet50_mod.paper")
    assert (cifar.model, cifar.val_fraction, cifar.data) == ("resnet50_cifar_mod", 0.1, "cifar10")
    assert "5 seeds" in cifar.note
    assert "ours" in cifar.note
    assert get_recipe("cifar100.resnet50_mod.paper").data == "cifar100"
    imagenet = get_recipe("imagenet.resnet50_mod.paper")
    assert (imagenet.epochs, imagenet.batch, imagenet.optimizer, imagenet.lr) == (100, 256, "sgd", 0.1)
    assert (imagenet.schedule, imagenet.step_size, imagenet.gamma) == ("step", 30, 0.1)
    assert (imagenet.momentum, imagenet.weight_decay, imagenet.nesterov) == (0.9, 1e-4, False)
    assert "3 seeds" in imagenet.note


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digits.resnet18_mop", r"did you mean resnet18_mod"),
        ("digit.resnet18_mod", r"did you mean digits\.resnet18_mod"),
        ("digits", "no recipe 'digits'"),
        ("cifar10.resnet18_mod.papr", "no recipe"),
        ("imagenet.resnet5_mod", "did you mean .*resnet50_mod"),
    ],
)
def test_unknown_recipes_are_refused_with_close_names(name, message):
    with pytest.raises(ValueError, match=message):
        get_recipe(name)


def test_recipes_are_listed_without_lightning():
    code = "import sys, pliant.recipes, pliant.train; print(pliant.recipes.list_recipes()[0]);"
    code += "assert not {'lightning', 'sklearn', 'torchmetrics'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("digits.")


def test_condconvs_recipe_is_one_for_network_and_base_line():
    paper = get_recipe("imagenet.cc_mobilenetv1_050.paper")
    plain = get_recipe("imagenet.mobilenetv1_w050.condconv")
    assert differences(plain, paper, leaving_out=["name", "model"]) == []
    assert (plain.ema, plain.nesterov, plain.augmentation, plain.mixup) == (None, True, "flip_crop", 0.0)
    assert "ours" in plain.note
    large = get_recipe("imagenet.cc_resnet50.condconv-regularized")
    assert (large.mixup, large.augmentation, large.model_args) == (0.2, "original", {"drop_rate": 0.2})
    assert "its rate is not given" in large.note


# Table, and parameters in millions that it prints, of the paper's ablations with 32 experts.
ABLATED = {
    "pointwise": "14.3", "depthwise": "8.8", "single": "14.6", "partially-shared": "14.6",
    "hidden-small": "14.6", "hidden-medium": "14.8", "hidden-large": "16.8", "hierarchical": "14.6",
    "softmax": "14.6", "begin-1": "14.9", "begin-3": "14.9", "begin-5": "14.8", "begin-13": "11.6",
    "features-only": "6.65", "classifier-only": "8.42", "hard-2": "14.6",
}  # fmt: skip


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_are_recipes_of_the_papers_networks(name):
    recipe = get_recipe(f"imagenet.cc_mobilenetv1_025.ablation-{name}")
    base = get_recipe("imagenet.cc_mobilenetv1_025.paper")
    assert differences(base, recipe, leaving_out=["name", "model_args"]) == []
    assert recipe.model_args["experts"] == 32
    with torch.device("meta"):
        model = timm.create_model(recipe.model, num_classes=1001, **recipe.model_args)
    if name in ABLATED:
        digits = len(ABLATED[name].partition(".")[2])
        assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.{digits}f}" == ABLATED[name]
    assert get_recipe(f"cifar10.cc_mobilenetv1_025.ablation-{name}").model == "cc_mobilenetv1_025_cifar"


def test_ablations_are_of_one_family():
    with pytest.raises(ValueError, match=r"of cc_mobilenetv1_\* networks, not of 'resnet20'"):
        get_recipe("cifar10.resnet20.ablation-single")
    assert not any(
        "ablation" in name
        for name in list_recipes()
        if "cc_mobilenetv1_" not in name and "_adn." not in name
    )
