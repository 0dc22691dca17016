"""Options that are gone: checkpoints with former defaults are read, others refused by name and tag."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import pliant
from pliant import MixtureOfDepths
from pliant._config import checksum
from pliant.checkpoint import CheckpointError, read_config

GOLDEN = Path(__file__).parents[2] / "golden"
GONE = {  # folder that the commit at the tag wrote: the option that it holds
    "gone-bias": ("selector_bias", True),
    "gone-core": ("core", "separable"),
    "gone-gate": ("gate", "map"),
    "gone-shared": ("share_selection", True),
    "gone-static": ("selection", "static"),
    "gone-straight": ("straight_through", True),
    "gone-temperature": ("temperature", 0.5),
}
FORMER = {
    "gate": "output",
    "temperature": 1.0,
    "straight_through": False,
    "selector_bias": False,
    "share_selection": False,
    "core": "block",
}


def message(name, value):
    return f"MixtureOfDepths no longer has {name}={value!r}; .* at the git tag before-house"


def test_the_golden_folders_hold_every_option_that_is_gone():
    assert {p.name for p in GOLDEN.glob("gone-*")} == set(GONE)
    assert {name for name, _ in GONE.values()} == {gone.name for gone in MixtureOfDepths.gone}


@pytest.mark.parametrize("folder", GONE)
def test_checkpoints_with_another_value_are_refused(folder, tmp_path):
    name, value = GONE[folder]
    assert read_config(GOLDEN / folder).arguments[name] == value
    shutil.copytree(GOLDEN / folder, tmp_path / "net")  # the weights would not be looked at
    save_file({}, tmp_path / "net" / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message(name, value)}"):
        pliant.load(tmp_path / "net")


@pytest.mark.parametrize(("name", "value"), GONE.values())
def test_other_values_are_refused_by_the_method_and_by_name(name, value):
    with pytest.raises(ValueError, match=message(name, value)):
        MixtureOfDepths(**{name: value})
    with pytest.raises(ValueError, match=message(name, value)):
        timm.create_model("resnet50_mod", **{name: value})


def changed(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps({**config, "config_sha256": checksum(config)}))


def test_former_defaults_are_read_as_absent(tmp_path):
    """As the commit before wrote them: in a method's options, and in a network's arguments."""
    x = torch.randn(2, 3, 16, 16)
    converted = pliant.convert(timm.create_model("resnet20_cifar"), MixtureOfDepths(c=4))
    pliant.save(converted, tmp_path / "converted")
    changed(tmp_path / "converted", lambda c: c["methods"][0]["options"].update(FORMER))
    named = timm.create_model("resnet20_cifar_mod", c=4)
    pliant.save(named, tmp_path / "named")
    changed(tmp_path / "named", lambda c: c["arguments"].update(FORMER))
    for model, place in ((converted, "converted"), (named, "named")):
        with torch.no_grad():
            assert torch.equal(pliant.load(tmp_path / place)(x), model.eval()(x))


def test_another_value_in_a_methods_options_is_refused(tmp_path):
    pliant.save(pliant.convert(timm.create_model("resnet20_cifar"), MixtureOfDepths()), tmp_path / "net")
    changed(tmp_path / "net", lambda c: c["methods"][0]["options"].update(gate="map"))
    with pytest.raises(CheckpointError, match=rf"config\.json: {message('gate', 'map')}"):
        pliant.load(tmp_path / "net")
