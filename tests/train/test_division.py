"""A run holds to the images that it began with, or refuses by name."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from _images import folder_recipe, make_folder
from _runs import Stop, assert_same
from pliant.train import Recipe, evaluate, fit
from pliant.train.data import load_data
from pliant.train.images import TensorImages
from pliant.train.run import read_division
from pliant.train.shard_writing import write_shards

OPTIONS = {"val_fraction": 0.2, "test_fraction": 0.3, "epochs": 1, "model_args": {"layers": [1, 1, 1]}}


def scored(run, *where, **options):
    return evaluate(run, *where, device="cpu", workers=0, **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on a folder of 30 images: 16 train, 5 validate, 9 test."""
    place = tmp_path_factory.mktemp("division")
    recipe = folder_recipe(make_folder(place / "photos", 10), **OPTIONS)
    return fit(recipe, place / "run", progress=False)


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """A copy of it, which trained on ``photos``, beside a copy of its images."""
    shutil.copytree(trained.folder.parent, tmp_path, dirs_exist_ok=True)
    for name in ("recipe.json", "images.json"):
        path = tmp_path / "run" / name
        path.write_text(path.read_text().replace(str(trained.folder.parent), str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def test_a_run_records_classes_kind_place_and_images_by_part(trained):
    kept = json.loads((trained.folder / "images.json").read_text())
    assert kept["data"] == "folder"
    assert kept["path"] == os.path.realpath(trained.recipe.path)
    assert kept["classes"] == ["blue", "green", "red"]
    data = load_data(trained.recipe)
    for part, images in (("train", data.train), ("val", data.val), ("test", data.test)):
        names = [name for label in kept["classes"] for name in kept["parts"][part][label]]
        assert names == [os.path.relpath(path, trained.recipe.path) for path in images.paths]


@pytest.mark.parametrize("part", ["test", "val"])
def test_images_that_were_added_change_nothing(run, part, caplog):
    before = scored(run, part=part)
    for name in ("blue/00", "green/5a", "red/z"):
        Image.new("RGB", (32, 32)).save(f"photos/{name}.png")
    (run.parent / "photos" / "amber").mkdir()
    Image.new("RGB", (32, 32)).save("photos/amber/0.png")
    assert scored(run, part=part) == before
    assert "has 4 images that the run did not begin with, such as amber/0.png" in caplog.text


def test_what_is_missing_is_named(run):
    lost = json.loads((run / "images.json").read_text())["parts"]["test"]["red"][0]
    Path("photos", lost).unlink()
    with pytest.raises(
        ValueError, match=rf"no longer 1 of the 9 images .* for test: {lost}\. Put them back"
    ):
        scored(run)
    scored(run, part="val")  # is whole
    Path("photos/blue").rename("photos/z")
    with pytest.raises(ValueError, match=r"has no class blue, .*; its classes are green, red, z now"):
        scored(run)


def test_a_place_is_known_however_it_is_written(run, caplog):
    found = scored(run)
    Path("link").symlink_to("photos")
    for path in ("photos", "./photos/", "../" + run.parent.name + "/photos", "link", run.parent / "photos"):
        assert scored(run, "folder", path) == found
    assert scored(run, path="photos") == found  # the kind of data is the run's
    assert not caplog.records
    Path("photos").rename("moved")
    assert scored(run, "folder", "moved") == found
    assert "moved holds all images of the run, so it is taken for" in caplog.text


def test_no_division_is_dropped_without_a_word(run, caplog):
    shutil.copytree("photos/red", "few/red")
    assert scored(run, path="few").images == 10
    assert "of the 10 images in few are ones that the run in" in caplog.text
    caplog.clear()
    Path("parts").mkdir()
    Path("photos").rename("parts/train")
    Path("photos").symlink_to("parts/train")
    assert scored(run).images == 9
    assert scored(run / "best", "folder", "photos").images == 30
    assert "16 of the 30 images in photos are ones that the run in" in caplog.text
    assert scored(run / "best") == scored(run)


def test_a_path_needs_its_kind_of_data_where_no_run_says_it(run):
    shutil.copytree(run / "best", "network")
    with pytest.raises(ValueError, match=r"path=photos needs its kind of data, such as data=folder"):
        scored("network", path="photos")
    with pytest.raises(ValueError, match=r"path=photos needs its kind of data"):
        scored(timm.create_model("resnet20_cifar"), path="photos")


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_a_run_goes_on_with_the_images_that_it_began_with(kind, tmp_path):
    root = make_folder(tmp_path / "photos", 8)
    recipe = replace(folder_recipe(root, **OPTIONS), data=kind, epochs=2, checkpoint_minutes=0)
    if kind == "shards":
        write_shards(root, tmp_path / "shards", images=10)
        recipe = replace(recipe, path=str(tmp_path / "shards"))
    whole = fit(recipe, tmp_path / "whole", progress=False)
    with pytest.raises(KeyError, match="stopped"):
        fit(recipe, tmp_path / "run", progress=False, callbacks=[Stop(2)])
    if kind == "folder":
        Image.new("RGB", (32, 32)).save(root / "blue" / "00.png")
    else:
        make_folder(tmp_path / "more", 2)
        (added,) = write_shards(tmp_path / "more", tmp_path / "other")
        added.rename(tmp_path / "shards" / "a.tar")
    assert_same(fit(recipe, tmp_path / "run", resume=True, progress=False), whole)
    assert read_division(tmp_path / "run") == read_division(tmp_path / "whole")


def test_a_class_of_an_image_that_changed_is_named(tmp_path):
    root = make_folder(tmp_path / "photos", 8)
    write_shards(root, tmp_path / "shards", shuffle=False)
    recipe = replace(folder_recipe(tmp_path / "shards", **OPTIONS), data="shards")
    division = load_data(recipe).division
    load_data(recipe, division)
    (tmp_path / "shards" / "classes.txt").write_text("green\nblue\nred\n")
    with pytest.raises(
        ValueError, match=r"blue/0\.png of .*shards is of class green now, and was of class blue"
    ):
        load_data(recipe, division)


def test_digits_are_held_to_by_their_numbers(tmp_path):
    recipe = Recipe(name="x", model="resnet20_cifar", pixels=8)
    first = load_data(recipe)
    again = load_data(replace(recipe, split_seed=1, val_fraction=0.5), first.division)
    for part in ("train", "val", "test"):
        one, two = getattr(first, part), getattr(again, part)
        assert isinstance(one, TensorImages)
        assert torch.equal(one.numbers, two.numbers)
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.labels, two.labels)


def test_a_damaged_record_is_named(run):
    (run / "images.json").write_text("{}")
    with pytest.raises(ValueError, match=r"images\.json cannot be read"):
        scored(run)


def test_one_class_is_refused_before_training(tmp_path):
    (tmp_path / "photos" / "defect").mkdir(parents=True)
    for i in range(8):
        Image.new("RGB", (32, 32)).save(tmp_path / "photos" / "defect" / f"{i}.png")
    with pytest.raises(ValueError, match="has one class, defect, and there is nothing to tell it from"):
        fit(folder_recipe(tmp_path / "photos"), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_scored_in_float32_and_not_trained(dtype, run, tmp_path):
    network = timm.create_model("resnet20_cifar", num_classes=3, layers=[1, 1, 1]).to(dtype)
    like = timm.create_model("resnet20_cifar", num_classes=3, layers=[1, 1, 1])
    like.load_state_dict(network.state_dict())
    found, wanted = (scored(one, "folder", "photos", pixels=32) for one in (network, like))
    assert found == wanted
    assert {p.dtype for p in network.parameters()} == {dtype}
    with pytest.raises(ValueError, match=rf"weights in {dtype}, and training keeps them in float32"):
        fit(folder_recipe("photos"), tmp_path / "new", model=network, progress=False)
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told_and_leaves_no_folder(run, tmp_path):
    recipe = replace(folder_recipe("photos"), accelerator="gpu")
    with pytest.raises(ValueError, match="accelerator=gpu needs a GPU, and PyTorch sees none"):
        fit(recipe, tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="device 'cuda' is not available: PyTorch sees no GPU"):
        evaluate(run, device="cuda")
