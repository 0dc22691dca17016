"""Folders that the commit `before-house` wrote are read as it wrote them.

Networks of three stages (8, 8 and 16 channels), each with the images ``x`` and the outputs ``y`` that
it gave on one thread; and the folder of a run of one epoch on digits.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pliant import evaluate, evaluate_depths, load, save
from pliant.surgery import conversions
from pliant.train import read_run

GOLDEN = Path(__file__).parent / "golden"
OUTPUTS = ".outputs.safetensors"
NAMES = sorted(
    path.name.removesuffix(".outputs.safetensors") for path in GOLDEN.glob("*.outputs.safetensors")
)
# What `conversions` says of each, sites left or not.
METHODS = {
    "plain": [],
    "mod": ["MixtureOfDepths"],
    "mod-options": ["MixtureOfDepths"],
    "mod-fixed": ["MixtureOfDepths"],
    "condconv": ["CondConv"],
    "condconv-options": ["CondConv"],
    "adn": ["AdaptiveDepth"],
    "subnet": ["AdaptiveDepth", "Subnet"],
    "mod-adn": ["MixtureOfDepths", "AdaptiveDepth"],
    "cc-adn": ["CondConv", "AdaptiveDepth"],
    "converted": ["MixtureOfDepths", "AdaptiveDepth"],
}


def test_every_method_has_a_folder():
    assert set(NAMES) == METHODS.keys()


@pytest.mark.parametrize("name", NAMES)
def test_networks_of_the_commit_before_compute_what_they_did(name, tmp_path):
    model, told = load(GOLDEN / name), load_file(GOLDEN / f"{name}{OUTPUTS}")
    assert [done.method.name for done in conversions(model)] == METHODS[name]
    stored = load_file(GOLDEN / name / "model.safetensors")
    state = model.state_dict()
    for key, flags in json.loads((GOLDEN / name / "config.json").read_text())["state"].items():
        assert state.pop(key).tolist() == flags  # they are a tensor now
    assert state.keys() == stored.keys()
    assert all(torch.equal(v, stored[k]) for k, v in state.items())
    with torch.no_grad():
        y = model(told["x"])
        # Bit by bit on the processor that wrote them; others sum in another order.
        torch.testing.assert_close(y, told["y"], rtol=1e-5, atol=1e-6)
        again = load(save(model, tmp_path / "again"))
        assert torch.equal(again(told["x"]), y)
    before, after = (
        json.loads((f / "config.json").read_text()) for f in (GOLDEN / name, tmp_path / "again")
    )
    for key in ("network", "arguments", "classes", "input_size", "mean", "std"):
        assert after[key] == before[key]


def test_a_finished_run_is_read_and_scores_what_it_did():
    run = read_run(GOLDEN / "run")
    assert run.recipe.objective == "specialize"
    assert len(run.history) == 1
    row = run.history[0]
    assert run.val_accuracy == row["val_accuracy"]
    assert evaluate(GOLDEN / "run", part="test").top1 == pytest.approx(run.test_accuracy, abs=1e-6)
    assert evaluate(GOLDEN / "run", part="val").top1 == pytest.approx(row["val_accuracy"], abs=1e-6)
    base = evaluate_depths(GOLDEN / "run", skips=["TTT"], part="val")[0]
    assert base.top1 == pytest.approx(row["val_accuracy_base"], abs=1e-6)
