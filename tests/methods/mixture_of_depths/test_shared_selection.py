"""`share_selection`: one selection for the blocks of a stage, in every form that a network takes."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

import pliant
from _adaptive import scramble
from _export import through_file
from pliant import AdaptiveDepth, CondConv, MixtureOfDepths, convert, plan
from pliant.counting import count_parameters
from pliant.deploy.forms import use_export_forms
from pliant.deploy.optimize import optimize, unfused
from pliant.methods.mixture_of_depths import MoDBlock, without_mod_blocks
from pliant.methods.mixture_of_depths import training as routed
from pliant.methods.mixture_of_depths.selectors import ChannelSelector, RandomSelector, SharedSelection
from research.analysis.routing import selection_frequency

LAYERS = [5, 4, 3]  # Mixture-of-Depths blocks 1 and 3 of the first stages, 1 of the last
OPTIONS = {
    "paper": {},
    "steady": {"order": "index", "fusion": "original"},
    "last": {"order": "index", "fusion": "last"},
    "replace": {"fusion": "replace"},
    "gate of the map": {"gate": "map", "selector_bias": True, "order": "index"},
    "all blocks": {"blocks": "all", "inner_shortcut": True, "temperature": 0.5},
}
every_option = pytest.mark.parametrize("option", OPTIONS)


def network(option="paper", **changes) -> nn.Module:
    options = {"c": 4, "reduction": 2, "share_selection": True, **OPTIONS[option], **changes}
    plain = timm.create_model("resnet20_cifar", layers=LAYERS)
    model = scramble(convert(plain, MixtureOfDepths(**options)))
    for name, p in model.named_parameters():
        if name.endswith("fc1.weight"):
            p.data.abs_()  # no hidden unit is silent: equal logits may be ranked in any order
    return model.eval()


def blocks(model) -> dict[str, MoDBlock]:
    return {path: m for path, m in model.named_modules() if isinstance(m, MoDBlock)}


class ByHand(nn.Module):
    """A selector that keeps what it says in a list, or repeats what is there."""

    def __init__(self, selector, kept):
        super().__init__()
        self.selector, self.kept = selector, kept

    def forward(self, x):
        if not isinstance(self.selector, SharedSelection):
            self.kept[:] = self.selector(x)
        return self.kept


def by_hand(model, *apart) -> nn.Module:
    """The same network, each stage's selection handed over beside the feature map, but of blocks apart."""
    model, kept = copy.deepcopy(model), []
    for path in blocks(model).keys() - {*apart}:
        block = model.get_submodule(path)
        block.passes_on, block.selector = False, ByHand(block.selector, kept)
    return model


# --- the function ------------------------------------------------------------------------------


@every_option
def test_later_blocks_take_the_first_ones_selection(option):
    model, x = network(option).double(), torch.randn(3, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), by_hand(model)(x), rtol=1e-12, atol=1e-12)
        alone = network(option, share_selection=False).double()
        kept = alone.load_state_dict(model.state_dict(), strict=False)
        assert kept.unexpected_keys == []
        assert all(".selector." in k for k in kept.missing_keys)
        assert (model(x) - alone(x)).abs().max() > 1e-3  # of their own they would take others


@every_option
@pytest.mark.parametrize("train", [False, True])
def test_gradients_reach_the_one_selector_from_all_blocks(option, train, monkeypatch):
    """In the operators of training, and in the plain form."""
    model, x = network(option).double().train(train), torch.randn(3, 3, 16, 16, dtype=torch.float64)
    found = []
    for usual in (False, True):
        monkeypatch.setattr(routed, "usual", lambda usual=usual: usual)
        one = copy.deepcopy(model)
        out = one(x)
        found.append([out, *torch.autograd.grad(out.square().sum(), [*one.parameters()])])
    monkeypatch.setattr(routed, "usual", lambda: False)
    one = by_hand(model)
    out = one(x)
    found.append([out, *torch.autograd.grad(out.square().sum(), [*one.parameters()])])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-8, atol=1e-8)


def test_one_random_draw_a_stage():
    model = network(selection="random", fusion="original")
    seen = {path: [] for path in blocks(model)}
    for path, block in blocks(model).items():
        block.core.register_forward_pre_hook(lambda m, args, p=path: seen[p].append(args[0]))
        block.register_forward_pre_hook(lambda m, args, p=path: seen[p].append(args[0]))
    with torch.no_grad():
        first, again = model(x := torch.randn(4, 3, 16, 16)), model(x)
    assert not torch.equal(first, again)

    def chosen(path):
        whole, picked = seen[path][:2]
        return (whole[:, None] == picked[:, :, None]).flatten(3).all(3).nonzero().tolist()

    assert chosen("layer1.1") == chosen("layer1.3") != chosen("layer2.1")
    assert len(chosen("layer1.1")) == 4 * 4


# --- what is built -----------------------------------------------------------------------------


def test_who_selects_and_who_takes():
    kinds = {path: type(block.selector) for path, block in blocks(network()).items()}
    own, taken = ChannelSelector, SharedSelection
    assert kinds == {
        "layer1.1": own,
        "layer1.3": taken,
        "layer2.1": own,
        "layer2.3": taken,
        "layer3.1": own,
    }
    kinds = {path: type(block.selector) for path, block in blocks(network(selection="random")).items()}
    assert [kinds["layer1.1"], kinds["layer1.3"]] == [RandomSelector, SharedSelection]
    named = blocks(network(blocks=("layer1.4", "layer1.2", "layer2.3")))
    assert {path: type(block.selector) for path, block in named.items()} == {
        "layer1.2": own,
        "layer1.4": taken,
        "layer2.3": own,
    }
    assert list(blocks(network(c=(0, 4, 4)))) == ["layer2.1", "layer2.3", "layer3.1"]
    assert [b.passes_on for b in blocks(network("all blocks")).values()] == [
        *(True, True, True, False),
        *(True, True, False),
        *(True, False),
    ]


def test_what_is_saved_is_the_selectors_that_are_not_there():
    # C C / r twice, with r = 4, for C = 16, 32, 64.
    shared, own = (
        count_parameters(timm.create_model("resnet20_cifar_mod", blocks="all", share_selection=share))
        for share in (True, False)
    )
    assert own - shared == 2688 == 2 * (16 * 4 + 32 * 8 + 64 * 16)


def test_the_plan_says_who_shares():
    plain = timm.create_model("resnet20_cifar", layers=LAYERS)
    told = str(plan(plain, MixtureOfDepths(c=4, reduction=2, share_selection=True)))
    assert "layer1.1: BasicBlock -> MoDBlock (C=16, c=4, k=4, hidden=8, passes_on=True)" in told
    assert "layer1.3: BasicBlock -> MoDBlock (C=16, c=4, k=4, shared=True)" in told
    nothing = "share_selection changes nothing: no stage has two such blocks of one width"
    assert nothing not in told
    assert nothing in str(plan(timm.create_model("resnet20_cifar"), MixtureOfDepths(share_selection=True)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share_selection": 1}, "share_selection must be True or False, not 1"),
        *(
            ({"share_selection": True, "selection": s}, f"selection='{s}' makes none")
            for s in ("static", "fixed", "first", "none")
        ),
        (
            {"share_selection": True, "straight_through": True},
            "later blocks have none; drop one of the two",
        ),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MixtureOfDepths(**options)


def test_who_shares_already_is_left_alone():
    """Or blocks would take the selection of whoever comes before them."""
    plain = timm.create_model("resnet20_cifar", layers=LAYERS)
    first, second = (
        MixtureOfDepths(c=4, share_selection=True, blocks=tuple(f"layer1.{n}" for n in between))
        for between in ((1, 3), (2, 4))
    )
    late = "layer1.1 shares a selection with others of its stage already; .* so layer1.2 comes too late"
    with pytest.raises(ValueError, match=late):
        convert(plain, first, second)
    apart = convert(plain, first, MixtureOfDepths(c=4, blocks=("layer1.2",))).eval()
    with torch.no_grad():
        torch.testing.assert_close(apart(x := torch.randn(2, 3, 16, 16)), by_hand(apart, "layer1.2")(x))
        for target in ("program", "onnx"):
            formed = use_export_forms(copy.deepcopy(apart), target, None)
            torch.testing.assert_close(formed(x), apart(x), rtol=1e-4, atol=1e-4)


def test_a_selection_that_is_lost_is_missed_by_name():
    model = network()
    model.layer1[2]._forward_hooks.clear()
    with pytest.raises(RuntimeError, match="no selection came with the feature map"):
        model(torch.randn(1, 3, 16, 16))


# --- composition -------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [False, True])
def test_at_both_depths_of_an_adaptive_network(skip):
    """Norms are switched in the block between: the selection goes past it all the same."""
    shared = network()
    model = convert(shared, AdaptiveDepth()).eval()
    x = torch.randn(2, 3, 16, 16)
    pliant.set_depth(model, (skip,) * 3)
    with torch.no_grad():
        out = model(x)
        torch.testing.assert_close(out, pliant.subnet(model, (skip,) * 3)(x))
        torch.testing.assert_close(out, by_hand(model)(x))
        assert torch.allclose(out, shared(x)) is not skip


def test_however_often_a_block_is_wrapped_it_passes_selections_along_once():
    model = convert(network(), AdaptiveDepth())
    again = convert(pliant.subnet(model, (False,) * 3), AdaptiveDepth())
    assert len(again.layer1[2]._forward_hooks) == len(again.layer1[2].block._forward_hooks) == 1


def test_gradient_checkpointing():
    model, x, found = network().train(), torch.randn(4, 3, 16, 16), []
    for checkpointing in (False, True):
        one = copy.deepcopy(model)
        one.set_grad_checkpointing(checkpointing)
        one(x).square().sum().backward()
        found.append([p.grad for p in one.parameters()])
    torch.testing.assert_close(*found)


def test_with_kernels_mixed_in_the_blocks_between():
    both = [MixtureOfDepths(c=4, reduction=2, share_selection=True), CondConv(experts=2, upcycle=False)]
    model = convert(timm.create_model("resnet20_cifar", layers=LAYERS), *both).eval()
    assert type(model.layer3[2]).__name__ == "CondConvBlock"
    with torch.no_grad():
        torch.testing.assert_close(model(x := torch.randn(2, 3, 16, 16)), by_hand(model)(x))


def test_saved_and_loaded(tmp_path):
    model, x = network(), torch.randn(2, 3, 16, 16)
    pliant.save(model, tmp_path / "net")
    with torch.no_grad():
        assert torch.equal(pliant.load(tmp_path / "net")(x), model(x))


def test_without_its_blocks():
    model, x = network(), torch.randn(2, 3, 16, 16)
    for block in blocks(bare := copy.deepcopy(model)).values():
        block.core = nn.Sequential(block.core, nn.Hardtanh(0, 1e-30))
    with torch.no_grad():
        torch.testing.assert_close(without_mod_blocks(model)(x), bare(x))


def test_frequencies_are_those_of_the_stage():
    data = [(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 1, 0]))]
    counts = selection_frequency(network(), data, ["cat", "dog"]).counts
    assert torch.equal(counts["layer1.1"], counts["layer1.3"])
    assert not torch.equal(counts["layer1.1"][:, :16], counts["layer2.1"][:, :16])


# --- files, compilers, engines -----------------------------------------------------------------


@every_option
def test_each_form_for_export_is_the_network(option):
    model = network(option)
    for target, batch in [("program", None), *((t, b) for t in ("onnx", "openvino") for b in (None, 1))]:
        formed = use_export_forms(copy.deepcopy(model), target, batch)
        x = torch.randn(batch or 3, 3, 16, 16)
        with torch.no_grad():
            torch.testing.assert_close(formed(x), model(x), rtol=1e-4, atol=1e-4)


def test_one_graph():
    model, x = network(), torch.randn(2, 3, 16, 16)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    program = torch.export.export(model, (x,), strict=True).module()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(program(x), model(x))


def test_neither_operator_knows_it_and_says_so():
    model, x = network(), torch.randn(2, 3, 16, 16)
    ready = optimize(model, x)
    takes, gives = "it takes another block's selection", "other blocks take its selection"
    assert {path: [part in why for part in (gives, takes)] for path, why in unfused(ready).items()} == {
        **{f"layer{n}.1": [True, False] for n in (1, 2)},
        **{f"layer{n}.3": [False, True] for n in (1, 2)},
    }
    with torch.no_grad():
        torch.testing.assert_close(ready(x), model(x), rtol=1e-4, atol=1e-4)
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    for path in ("layer1.1", "layer1.3"):
        assert model.train().get_submodule(path)._native(x) is None


def test_an_onnx_file_ranks_once_a_stage(tmp_path):
    onnx = pytest.importorskip("onnx")
    found, expected = through_file(network(), path := tmp_path / "net.onnx")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("TopK") == 3


@pytest.mark.slow
@every_option
@pytest.mark.parametrize("ending", [".pt2", ".onnx", ".xml"])
def test_files_are_held_against_the_network(option, ending, tmp_path):
    found, expected = through_file(network(option), tmp_path / f"net{ending}")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
