"""Evaluation prepares images as the network's configuration says: size, interpolation, crop."""

from __future__ import annotations

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform

from _images import all_of, make_folder
from pliant import save
from pliant.train.evaluation import prepare

COLOURS = ("blue", "green", "red")


def network(**config):
    model = timm.create_model("resnet20_cifar", num_classes=3)
    told = {**model.pretrained_cfg, "label_names": COLOURS, **config}
    vars(model).update(pretrained_cfg=told, default_cfg=told)
    return model


@pytest.mark.parametrize(
    "config",
    [
        {"interpolation": "bicubic", "crop_pct": 0.75},
        {"interpolation": "bilinear", "crop_pct": 0.9, "crop_mode": "squash"},
        {"input_size": (3, 24, 40), "interpolation": "bicubic", "crop_pct": 1.0},
        {"input_size": (3, 40, 24), "interpolation": "nearest", "crop_pct": 0.8, "crop_mode": "border"},
    ],
)
def test_images_of_files_are_prepared_as_timm_prepares_them(tmp_path, config):
    root = make_folder(tmp_path / "images", per_class=1, size=(50, 61))
    model = network(**config)
    with_timm = timm.data.resolve_model_data_config(model)
    transform = create_transform(**with_timm)
    paths = sorted(root.glob("*/*.png"))
    expected = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    saved = save(model, tmp_path / "net", verify=False)
    for form in (model, saved):
        x, y = all_of(prepare(form, "folder", root, workers=0, device="cpu").batches)
        assert torch.equal(x, expected)
        assert x.shape[2:] == with_timm["input_size"][1:]
        assert y.tolist() == [COLOURS.index(path.parent.name) for path in paths]
    x, _ = all_of(prepare(saved, "folder", root, workers=0, device="cpu", pixels=16).batches)
    assert x.shape[2:] == (16, 16)


def test_images_in_memory_get_an_oblong_size_too():
    model = timm.create_model("resnet20_cifar", in_chans=1)
    config = {**model.pretrained_cfg, "input_size": (1, 16, 24)}
    vars(model).update(pretrained_cfg=config)
    given = prepare(model, "digits", batch=540, device="cpu")
    ((x, y),) = given.batches
    assert x.shape == (540, 1, 16, 24)
    assert len(y) == 540
