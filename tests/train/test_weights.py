"""Weights to start from: what files of all kinds hold, of other classes too, and what is not read."""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

import pliant
from pliant import save
from pliant.train.data import load_data
from pliant.train.networks import teaching_of
from pliant.train.recipe import Recipe
from pliant.train.weights import load_weights

SMALL = {"channels": (8, 8, 16)}
OPTIONS = {  # a named form of each method, as it starts from a plain network
    "resnet20_cifar": {},
    "resnet20_cifar_mod": {"zero_init_last": True},
    "cc_resnet20_cifar": {"upcycle": True, "experts": 2},
    "resnet20_cifar_adn": {"skippable": (1, 0, 0)},
}


def plain(**options):
    torch.manual_seed(1)
    return timm.create_model("resnet20_cifar", **SMALL, **options).eval()


def loaded(place, caplog=None, **options):
    torch.manual_seed(2)
    model = timm.create_model("resnet20_cifar", **SMALL)
    load_weights(model, place, **options)
    return model


def same(model, other):
    a, b = model.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("also", ["model", "state_dict"])
@pytest.mark.parametrize("average", ["model_ema", "state_dict_ema"])
def test_of_an_average_and_the_last_weights_the_average_is_taken_as_timm_does(
    tmp_path, caplog, average, also
):
    last, averaged = plain(), plain()
    nn.init.normal_(averaged.fc.weight)
    file = tmp_path / "f.pth"
    told = {also: last.state_dict(), average: averaged.state_dict(), "epoch": 3}
    torch.save({**told, "args": argparse.Namespace(lr=0.1)}, file)
    assert same(loaded(file), averaged)
    assert f"holds {average}, {also}; the weights are {average}, as timm takes them" in caplog.text
    reference = plain()
    timm.models.load_checkpoint(reference, str(file))
    assert same(reference, averaged)
    caplog.clear()
    torch.save({also: last.state_dict(), "epoch": 3}, file)
    assert same(loaded(file), last)
    assert not caplog.records


@pytest.mark.parametrize("start", ["model.", "net.inner.", "module.", "_orig_mod.", "model._orig_mod."])
@pytest.mark.parametrize("form", [name for name in OPTIONS if not name.startswith("cc_")])
def test_a_network_within_another_module(tmp_path, caplog, start, form):
    """As in checkpoints of Lightning, of DataParallel and of torch.compile."""
    network, file = plain(), tmp_path / "last.ckpt"
    state = {f"{start}{k}": v for k, v in network.state_dict().items()}
    torch.save(
        {"state_dict": {**state, "loss.weight": torch.ones(10)}, "pytorch-lightning_version": "2"}, file
    )
    model = timm.create_model(form, **SMALL, **OPTIONS[form])
    load_weights(model, file)
    assert torch.equal(model.fc.weight, network.fc.weight)
    assert torch.equal(model.conv1.weight, network.conv1.weight)
    assert f"the weights are those of {start[:-1]}; beside them are loss.weight" in caplog.text
    if form == "resnet20_cifar":
        assert same(model, network)


def test_the_checkpoint_of_a_run(tmp_path, caplog):
    recipe = Recipe(
        name="tiny", model="resnet20_cifar", model_args={"layers": [1, 1, 1]}, pixels=8, epochs=2,
        accelerator="cpu", ema=0.9, threads=1,
    )  # fmt: skip
    run = pliant.fit(recipe, tmp_path / "run", progress=False)
    model = timm.create_model("resnet20_cifar", layers=(1, 1, 1), in_chans=1)
    load_weights(model, run.folder / "checkpoints" / "last.ckpt")
    assert same(model, run.model)
    assert f"the weights are those of the best epoch so far, the run's {run.best_epoch + 1}." in caplog.text


@pytest.mark.parametrize("classes", [7, 0])
@pytest.mark.parametrize("form", OPTIONS)
def test_weights_of_other_classes_leave_the_classifier_as_it_is(tmp_path, caplog, form, classes):
    network = plain(num_classes=classes)
    file = tmp_path / "f.pth"
    torch.save(network.state_dict(), file)
    for place in (file, save(network, tmp_path / "net")):
        caplog.clear()
        model = timm.create_model(form, **SMALL, **OPTIONS[form])
        load_weights(model, place, classes=tuple("0123456789"))
        assert "another number of classes: the classifier is new (" in caplog.text
        assert [r.levelno for r in caplog.records] == [logging.WARNING]
        assert torch.equal(model.conv1.weight, network.conv1.weight)
        assert model(torch.randn(2, 3, 8, 8)).shape == (2, 10)
        with pytest.raises(ValueError, match="do not fit"):
            load_weights(model, place, new_classifier=False)


def test_a_converted_classifier_of_other_classes_is_new_too(tmp_path, caplog):
    options = {**SMALL, "experts": 2}
    there = save(timm.create_model("cc_resnet20_cifar", **options, num_classes=7), tmp_path / "net")
    model = timm.create_model("cc_resnet20_cifar", **options)
    before = model.fc.weight.clone()
    load_weights(model, there)
    assert torch.equal(model.fc.weight, before)
    assert torch.equal(model.conv1.weight, pliant.load(there).conv1.weight)
    assert "the classifier is new (fc.weight" in caplog.text


def test_what_a_teacher_knows_is_never_new(tmp_path):
    """Its weights, and those of the network before its conversion, are of the data's classes."""
    there = save(plain(num_classes=7, in_chans=1), tmp_path / "net")
    recipe = Recipe(
        name="a", model="resnet20_cifar_adn", model_args={**SMALL, "skippable": (1, 0, 0)}, pixels=8,
        weights=there, teacher="plain",
    )  # fmt: skip
    data = load_data(recipe)
    named = replace(
        recipe, teacher="resnet20_cifar", teacher_args=SMALL, teacher_weights=there, weights=None
    )
    for taught in (recipe, named):
        with pytest.raises(ValueError, match=r"fc\.bias is float \[7\] instead of float \[10\]"):
            teaching_of(taught, data, plain())


class Attack:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return (type(self.place).mkdir, (self.place,))


@pytest.mark.parametrize("ending", [".pth", ".pt", ".ckpt", ".bin"])
def test_nothing_in_a_file_runs_whatever_timm_would_do(tmp_path, monkeypatch, ending):
    monkeypatch.setattr("timm.models.load_state_dict", lambda *_, **__: pytest.fail("timm reads the file"))
    file = tmp_path / f"f{ending}"
    torch.save({"state_dict": plain().state_dict(), "args": Attack(tmp_path / "owned")}, file)
    with pytest.raises(ValueError, match=r"objects, which are not read because .*save its state dict"):
        loaded(file)
    assert not (tmp_path / "owned").exists()
    for name in ("model_args", "teacher_args"):
        with pytest.raises(ValueError, match=f"{name} must not hold 'checkpoint_path'; set .*weights="):
            Recipe(
                name="a", model="resnet20_cifar", teacher="resnet20_cifar", teacher_weights="w",
                **{name: {"checkpoint_path": str(file)}},
            )  # fmt: skip


@pytest.mark.parametrize("content", [[1, 2], torch.ones(3), {1: torch.ones(1)}, "text"])
def test_files_that_hold_something_else(tmp_path, content):
    torch.save(content, tmp_path / "f.pt")
    with pytest.raises(ValueError, match=r"f\.pt is no file of weights: it holds a "):
        loaded(tmp_path / "f.pt")
