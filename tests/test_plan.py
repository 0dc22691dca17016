"""The plan of a conversion: its counts, and what is printed."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import prune

from _surgery import ShareTheMean, assert_untouched, small, snapshot
from pliant import AdaptiveDepth, CondConv, MixtureOfDepths, at_depth, convert, plan, subnet
from pliant.anatomy import stages
from pliant.counting import count_macs, count_parameters
from pliant.method import Method, PassedOver, Site, Survey


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


# --- what cannot be counted, hooks, computed weights ------------------------------------------------


def test_a_network_that_fails_is_planned_all_the_same():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.stage = nn.Sequential(*(timm.models.resnet.BasicBlock(16, 16) for _ in range(2)))

        def forward(self, x):
            if x.shape[2] < 9:
                raise TypeError("images of 8 pixels are too small\nand more")
            return self.stage(x)

    made = plan(Odd(), MixtureOfDepths(c=4), input_size=(16, 8, 8))
    assert (made.macs, len(made.replacements)) == (None, 1)
    assert (
        "MACs: not counted (it fails on the meta device, on an image of 16x8x8: TypeError: images of 8 "
        "pixels are too small)"
    ) in str(made)
    assert plan(Odd(), MixtureOfDepths(c=4), input_size=(16, 9, 9)).macs is not None


def test_a_plan_says_that_the_converted_network_fails():
    @dataclass(frozen=True, kw_only=True)
    class Widen(Method):
        def survey(self, model):
            return Survey((Site("layer1.1"),))

        def replace(self, module, site):
            return nn.Conv2d(16, 17, 1)

    made = plan(small(), Widen())
    assert made.macs is None
    assert "MACs: not counted (once converted, it fails on the meta device, on an image of 3x32x32" in str(
        made
    )


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_a_plan_runs_no_hook_and_notes_those_that_go(kind):
    model, ran = small(), []
    for path in ("", "layer1.0", "layer1.1", "layer1.1.conv1", "fc"):
        module = model.get_submodule(path)
        getattr(module, f"register_{kind}_hook")(lambda *_, path=path: ran.append(path))
    made = plan(model, MixtureOfDepths(c=4))
    assert ran == []
    (note,) = [note for note in made.notes if "hooks" in note]
    assert note == "hooks go with what is replaced, those of layer1.1, layer1.1.conv1; register them anew"
    kept = convert(model, MixtureOfDepths(c=4))
    kept.train()(torch.randn(2, 3, 16, 16)).sum().backward()
    assert set(ran) == {"", "layer1.0", "fc"}
    assert not any("hooks" in note for note in plan(small(), MixtureOfDepths(c=4)).notes)


@pytest.mark.parametrize("method", [AdaptiveDepth(), CondConv(experts=2, begin=2)], ids=lambda m: m.name)
def test_hooks_of_what_a_method_keeps_run(method):
    """In both of a block's depths, and where its convolutions are mixed; with the block itself."""
    model, seen = small(), []
    for path in ("layer1.0", "layer1.0.bn1", "layer1.0.act1"):
        model.get_submodule(path).register_forward_hook(lambda m, args, y: seen.append(type(m).__name__))
    model.layer1[0].register_forward_hook(lambda m, args, options, y: y + 1, with_kwargs=True)
    model.layer1[0].register_forward_pre_hook(lambda m, args: args[0] * 2)
    model.layer1[0].register_forward_pre_hook(lambda m, args, options: None, with_kwargs=True)
    assert not any("hooks" in note for note in plan(model, method).notes)
    made = convert(model, method)
    wanted = ["BatchNorm2d", "ReLU", "BasicBlock"]
    with torch.no_grad():
        x = torch.randn(2, 3, 16, 16)
        torch.testing.assert_close(made(x).shape, model(x).shape)
        assert [name for name in seen if name in wanted] == 2 * wanted
        if method == AdaptiveDepth():
            with at_depth(made, "TTTT"):
                made(x)
            assert [name for name in seen if name in wanted] == 3 * wanted
            plain = subnet(made, "TTTT")
            with at_depth(made, "TTTT"):
                assert torch.equal(plain(x), made(x))


COMPUTED = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    "weight norm": lambda layer: nn.utils.weight_norm(layer),
    "spectral norm": lambda layer: nn.utils.spectral_norm(layer),
    "parametrized": lambda layer: nn.utils.parametrizations.weight_norm(layer),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("computed", COMPUTED.values(), ids=COMPUTED)
@pytest.mark.parametrize(
    "method",
    [MixtureOfDepths(c=4), CondConv(experts=2, begin=2), AdaptiveDepth()],
    ids=lambda m: m.name,
)
def test_networks_whose_weights_are_computed(method, computed):
    model = small()
    for path in ("layer1.0.conv2", "layer2.1.conv1"):
        computed(model.get_submodule(path))
    x = torch.randn(2, 3, 16, 16)
    model.train()(x).sum().backward()  # the weights hang on a graph, which cannot be copied
    made = plan(model, method)
    assert made.macs is not None
    new = convert(model.eval(), method)
    with torch.no_grad():
        new(x)
    if isinstance(method, AdaptiveDepth):
        assert torch.equal(new(x), model(x))
    elif isinstance(method, CondConv):
        left = {p.path: p.reason for _, p in made.passed_over}
        assert left["layer1.0.conv2"] == left["layer2.1.conv1"] != ""
    new.train()(x).sum().backward()
