"""Small folders of images, a recipe that trains on one, and damage to them."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from pliant.train import Recipe

COLOURS = {"blue": (20, 30, 220), "green": (20, 220, 30), "red": (220, 30, 20)}


def make_folder(root, per_class=8, size=(40, 32), seed=0):
    rng = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = np.clip(rng.normal(colour, 20, (*size, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def folder_recipe(path, **options):
    values = {"workers": 0, "pixels": 32, "batch": 4, "epochs": 2, "lr": 0.05, "accelerator": "cpu"}
    return Recipe(name="f", model="resnet20_cifar", data="folder", path=path, **{**values, **options})


def all_of(batches):
    pairs = list(batches)
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def damage(path):
    path.write_bytes(path.read_bytes()[:60])
    return str(path)
