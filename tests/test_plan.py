"""The plan of a conversion: its counts, and what is printed."""

from __future__ import annotations

import timm
import torch
from torch import nn

from _surgery import ShareTheMean, assert_untouched, small, snapshot
from pliant import MixtureOfDepths, convert, plan
from pliant.anatomy import stages
from pliant.counting import count_macs, count_parameters
from pliant.method import PassedOver


def test_plan_counts_are_those_of_the_converted_network():
    model = small()
    for method in (
        MixtureOfDepths(c=4),
        MixtureOfDepths(selection="none"),
        MixtureOfDepths(c=2, blocks="all"),
    ):
        before = snapshot(model)
        made = plan(model, method)
        assert_untouched(model, before)
        real = convert(model, method)
        assert made.parameters == (count_parameters(model), count_parameters(real))
        assert made.input_size == (3, 32, 32)
        assert made.macs == (count_macs(model, (3, 32, 32)), count_macs(real, (3, 32, 32)))
        assert made.macs[1] < made.macs[0]
    other = plan(model, method, input_size=(3, 64, 64))
    assert other.input_size == (3, 64, 64)
    assert other.macs[0] == count_macs(model, (3, 64, 64))


def test_plan_of_two_methods_counts_both():
    method = MixtureOfDepths(c=4)
    made = plan(small(), method, ShareTheMean(stages=(1,)))
    assert [(r.method, r.path, r.before, r.after) for r in made.replacements] == [
        ("MixtureOfDepths", "layer1.1", "BasicBlock", "MoDBlock"),
        ("MixtureOfDepths", "layer2.1", "BasicBlock", "MoDBlock"),
        ("MixtureOfDepths", "layer3.1", "BasicBlock", "MoDBlock"),
        ("MixtureOfDepths", "layer4.1", "BasicBlock", "MoDBlock"),
        ("ShareTheMean", "layer2", "Sequential", "Run"),
    ]
    assert ("ShareTheMean", PassedOver("layer1", "not asked for")) in made.passed_over


def test_printed_plan_mentions_every_block():
    model = timm.create_model("resnet50")
    text = str(plan(model, MixtureOfDepths(c=64)))
    lines = text.splitlines()
    assert lines[0] == "layer1.1: Bottleneck -> MoDBlock (C=256, c=64, k=4, hidden=16)"
    assert "  layer1.0: a stage's first block stays" in lines
    assert "  layer1.2: an even block stays" in lines
    for stage in stages(model):
        for block in stage.blocks:
            assert sum(line.strip().startswith(f"{block.path}:") for line in lines) == 1, block.path
    assert "parameters: 25,557,032 -> 18,105,949 (70.8%)" in lines
    assert "MACs at 3x224x224: 4,089,184,256 -> 2,561,987,008 (62.7%)" in lines
    assert lines[-1].startswith("note: the new blocks are narrow and start fresh")
    for quiet in (MixtureOfDepths(zero_init_last=True), MixtureOfDepths(selection="none")):
        assert "note:" not in str(plan(model, quiet))


def test_plan_without_a_known_input_size():
    stage = nn.Sequential(*(timm.models.resnet.BasicBlock(16, 16) for _ in range(2)))
    made = plan(stage, MixtureOfDepths(c=4))
    assert made.macs is None
    assert "MACs: not counted (the network does not say its input size)" in str(made)
    counted = plan(stage, MixtureOfDepths(c=4), input_size=(16, 8, 8))
    assert counted.macs[0] == 4 * 16 * 16 * 9 * 64


def test_plan_needs_no_weights():
    """It plans on a copy without weights: nothing real is allocated for the new blocks."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not out.is_meta:
                Largest.seen = max(Largest.seen, out.numel())
            return out

    model = small()
    with Largest():
        plan(model, MixtureOfDepths(c=4))
    assert Largest.seen < 64
