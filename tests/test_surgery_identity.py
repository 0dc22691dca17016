"""Surgery knows modules by identity: aliases, blocks that run twice, tied tensors, wrappers."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from _surgery import assert_untouched, small, snapshot
from pliant import AdaptiveDepth, CondConv, MixtureOfDepths, at_depth, convert, load, plan, save, subnet
from pliant.anatomy import RemovedBlock, blocks, stages
from pliant.methods.mixture_of_depths import MoDBlock, without_mod_blocks
from pliant.parts import Part, substitute
from pliant.surgery import conversions, methods_in

METHODS = {
    "mod": MixtureOfDepths(c=4, reduction=4),
    "condconv": CondConv(experts=2, begin=2),
    "condconv by layer": CondConv(experts=2, begin=2, routing="layer"),
    "adn": AdaptiveDepth(),
}


class Aliased(nn.Module):
    """A network, and some of its stages under names of the wrapper's own."""

    def __init__(self, base: nn.Module, before: tuple[str, ...] = ()) -> None:
        super().__init__()
        for path in before:
            setattr(self, path.replace(".", "_"), base.get_submodule(path))
        self.base, self.layer1, self.layer2 = base, base.layer1, base.layer2

    def forward(self, x):
        b = self.base
        return self.layer2(self.layer1(b.act1(b.bn1(b.conv1(x)))))


def images(batch=2):
    torch.manual_seed(1)
    return torch.randn(batch, 3, 16, 16)


def run(network, x):
    torch.manual_seed(2)
    with torch.no_grad():
        return network.eval()(x)


def repeated() -> nn.Module:
    """A network one of whose blocks runs twice in a row."""
    model = small()
    first, block = model.layer2
    model.layer2 = nn.Sequential(first, block, block)
    return model


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("before", [(), ("layer4.1",), ("layer1.1", "layer3.0")], ids=str)
def test_aliases_are_one_module(method, before):
    """A wrapper is converted as the network in it is, wherever its own names stand."""
    torch.manual_seed(0)
    made = convert(Aliased(small(), before), method)
    torch.manual_seed(0)
    alone = Aliased(convert(small(), method))
    assert made.base.layer1 is made.layer1
    assert made.base.layer2 is made.layer2
    assert len({id(m) for m in made.modules() if isinstance(m, Part)}) == sum(
        isinstance(m, Part) for m in alone.modules()
    )
    torch.testing.assert_close(run(made, images()), run(alone, images()))
    planned = plan(Aliased(small(), before), method)
    inner = plan(small(), method)
    assert [r.path.removeprefix("base.") for r in planned.replacements][: len(inner.replacements) - 1] == [
        r.path for r in inner.replacements
    ][: len(inner.replacements) - 1]
    assert planned.parameters == inner.parameters


def test_a_block_is_of_the_stage_that_has_most():
    model = Aliased(small(), before=("layer4.1", "layer3.0"))
    assert [[b.path for b in stage.blocks] for stage in stages(model)] == [
        [f"base.layer{n}.0", f"base.layer{n}.1"] for n in (1, 2, 3, 4)
    ]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_block_that_runs_twice_is_replaced_at_both_places(method):
    made = convert(repeated(), method)
    assert made.layer2[1] is made.layer2[2]
    assert isinstance(made.layer2[1], Part) == (getattr(method, "routing", "") != "layer")
    made.train()(images(4)).sum().backward()
    (row,) = [r for r in plan(repeated(), method).replacements if r.path.startswith("layer2.1")][:1]
    assert row.before in ("BasicBlock", "Conv2d")
    assert run(made, images()).isfinite().all()


def test_controls_and_depths_of_a_block_that_runs_twice():
    made = convert(repeated(), METHODS["mod"])
    assert not any(isinstance(m, MoDBlock) for m in without_mod_blocks(made).modules())
    made = convert(repeated(), AdaptiveDepth())
    with at_depth(made, "FTFF"):
        expected = run(made, images())
    assert torch.equal(run(subnet(made, "FTFF"), images()), expected)


@pytest.mark.parametrize("routing", ["single", "shared", "hierarchical"])
def test_a_unit_that_runs_twice_has_no_one_source_of_its_routing(routing):
    model = repeated()
    with pytest.raises(ValueError, match=r"layer2\.1 stands at layer2\.2 too.*take routing='block'"):
        plan(model, CondConv(experts=2, begin=2, routing=routing))
    convert(model, CondConv(experts=2, begin=6, routing=routing))


def test_a_layer_that_a_block_calls_twice():
    torch.manual_seed(0)
    block = timm.models.resnet.BasicBlock(8, 8).eval()
    block.conv2, block.bn2 = block.conv1, block.bn1
    model = nn.Sequential(nn.Sequential(block, timm.models.resnet.BasicBlock(8, 8)), nn.Flatten()).eval()
    made = convert(
        model, CondConv(experts=2, activation="softmax", begin=2, classifier=False, per_channel=True)
    )
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(run(made, x), run(model, x), rtol=1e-4, atol=1e-4)
    adaptive = convert(model, AdaptiveDepth())
    assert adaptive[0][0].block.bn1 is adaptive[0][0].block.bn2
    assert torch.equal(run(adaptive, x), run(model, x))
    with at_depth(adaptive, "T"):
        assert run(adaptive, x).shape == (2, 8 * 36)


def tie(model, one, other):
    owner, _, name = one.rpartition(".")
    setattr(model.get_submodule(owner), name, model.get_parameter(other))
    return model


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("method", "one", "other"),
    [
        (METHODS["mod"], "layer1.1.conv1.weight", "layer1.0.conv1.weight"),
        (MixtureOfDepths(c=4, blocks="all"), "layer1.1.conv1.weight", "layer1.1.conv2.weight"),
        (METHODS["condconv"], "layer1.1.conv1.weight", "layer1.0.conv1.weight"),
        (METHODS["condconv"], "layer1.1.conv1.weight", "layer1.1.conv2.weight"),
        (METHODS["condconv by layer"], "layer1.1.conv1.weight", "layer1.0.conv1.weight"),
        (CondConv(experts=2), "fc.weight", "embedding.weight"),
        (METHODS["adn"], "layer1.0.bn1.weight", "layer1.0.bn2.weight"),
    ],
)
def test_tied_tensors_are_refused_by_name(method, one, other, inplace):
    model = small()
    model.embedding = nn.Embedding(10, 128)
    tie(model, one, other)
    if method == MixtureOfDepths(c=4, blocks="all"):  # the whole block goes, and its tie with it
        convert(model, method, inplace=inplace)
        return
    before = snapshot(model)
    names = rf"(?s)(?=.*{one})(?=.*{other if method != METHODS['adn'] else 'tensor too'})"
    for call in (plan, convert):
        with pytest.raises(ValueError, match=names):
            call(model, method, **({"inplace": inplace} if call is convert else {}))
    assert_untouched(model, before)


def test_a_layer_that_two_blocks_share_is_refused_by_name():
    model = small()
    model.layer1[0].bn1 = model.layer1[1].bn1
    model.layer1[0].conv1 = model.layer1[1].conv1
    assert convert(model, METHODS["condconv by layer"]).layer1[0].conv1.router is not None
    for name in ("mod", "condconv", "adn"):
        with pytest.raises(ValueError, match=r"layer1\.0\.\w+1 and layer1\.1\.\w+1 are one \w+2d"):
            convert(model, METHODS[name])
    model = small()
    model.layer1[0].act1 = model.layer1[1].act1  # it learns nothing
    convert(model, METHODS["mod"])


def test_what_a_method_keeps_may_stay_tied():
    model = tie(small(), "layer1.0.conv2.weight", "layer1.1.conv2.weight")
    made = convert(model, AdaptiveDepth())
    assert made.layer1[0].block.conv2.weight is made.layer1[1].block.conv2.weight
    assert isinstance(subnet(made, "TTTT").layer1[1], RemovedBlock)


def test_substitute_reaches_all_places():
    old, new = nn.ReLU(), nn.Tanh()
    network = nn.ModuleDict({"a": old, "b": nn.ModuleList([old, nn.Sequential(old)])})
    substitute(network, old, new)
    assert network["a"] is network["b"][0] is network["b"][1][0] is new


# --- records ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda net: nn.Sequential(nn.Identity(), net)])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_network_taken_out_of_its_wrapper_has_its_record(tmp_path, wrap, method):
    wrapped = convert(wrap(small()), method)
    inner = list(wrapped.children())[-1]
    (done,) = conversions(inner)
    assert done.method == method
    assert [inner.get_submodule(site) for site in done.sites]
    assert methods_in(wrapped) == methods_in(inner) == [method]
    again = load(save(inner, tmp_path / "net"))
    assert torch.equal(run(again, images()), run(inner, images()))


def test_a_depth_cut_out_of_a_wrapped_network_is_recorded_too(tmp_path):
    cut = subnet(convert(nn.DataParallel(small()), AdaptiveDepth()), "TFTF")
    assert [c.method.name for c in conversions(cut.module)] == ["AdaptiveDepth", "Subnet"]
    again = load(save(cut.module, tmp_path / "net"))
    assert torch.equal(run(again, images()), run(cut.module, images()))


def test_two_backbones_have_a_record_each():
    both = convert(nn.ModuleDict({"a": small(), "b": small()}), METHODS["mod"])
    assert [len(conversions(net)[0].sites) for net in both.values()] == [4, 4]
    assert methods_in(both) == [METHODS["mod"]]
    assert len(blocks(both)) == 16
