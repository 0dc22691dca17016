"""Depths of a network that is traced, exported, replicated, checkpointed, compiled or saved."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.models import checkpoint_seq
from torch import nn
from torch.utils.checkpoint import checkpoint

from _adaptive import (
    BASE,
    FULL,
    MIXED,
    adaptive,
    dynamo_reads_contexts,
    images,
    in_thread,
    outputs,
    scramble,
)
from pliant import AdaptiveDepth, at_depth, convert, get_depth, load, save, set_depth, subnet
from pliant.methods.adaptive_depth.depth import compile_depths
from pliant.surgery import conversions

# --- traced, exported and replicated --------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_traced_and_exported_networks_have_one_depth_and_refuse_others():
    model, x = adaptive(), images()
    expected = outputs(model, x)
    with at_depth(model, MIXED), torch.no_grad():
        traced = torch.jit.trace(model, x)
        exported = torch.export.export(model, (x,)).module()
    cut = torch.export.export(subnet(model, MIXED), (x,))
    for frozen in (traced, exported, cut.module()):
        with torch.no_grad(), at_depth(model, BASE):
            assert torch.equal(frozen(x), expected[MIXED])
        with pytest.raises(ValueError, match="exported has one depth for ever: switch the network that it"):
            set_depth(frozen, BASE)
    # What was cut out takes its own weights only along.
    names = dict(cut.named_parameters())
    assert len(names) == len(list(subnet(model, MIXED).parameters())) < len(list(model.parameters()))


def test_replicas_of_data_parallel_run_at_the_depth_of_their_caller():
    model, x = adaptive(), images()
    block = model.layer1[0]
    with at_depth(model, BASE):
        replica = block._replicate_for_data_parallel()
    replica.block = block.block
    with torch.no_grad():
        features = model.conv1(x)
        with at_depth(model, BASE):
            expected = block(features.clone())
        # Its threads have contexts of their own.
        assert torch.equal(in_thread(lambda: torch.no_grad()(replica)(features.clone())), expected)
        assert not torch.equal(block(features.clone()), expected)


# --- gradient checkpointing -----------------------------------------------------------------------


def gradients(model, forward) -> dict[str, torch.Tensor]:
    model.zero_grad()
    forward().square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad)


@pytest.mark.parametrize("family", ["option A", "vit"])
@pytest.mark.parametrize("every", [1, 2])
def test_checkpointing_runs_again_at_the_depth_of_the_forward(family, every):
    model, x = adaptive(family), images()
    blocks = (
        [b for s in (model.layer1, model.layer2, model.layer3) for b in s]
        if family != "vit"
        else model.blocks
    )
    skip = (True, False, True)[: len(get_depth(model))]
    start = images()[:, :1].expand(2, 16, 32, 32) if family != "vit" else torch.randn(2, 5, 32)
    del x

    def forward(at, checkpointed):
        with at_depth(model, at):
            y = start.clone().requires_grad_(True)
            return checkpoint_seq(blocks, y, every=every) if checkpointed else nn.Sequential(*blocks)(y)

    for at in (skip, (True,) * len(skip), (False,) * len(skip)):
        expected = gradients(model, lambda at=at: forward(at, False))
        assert_same(gradients(model, lambda at=at: forward(at, True)), expected)


def test_timms_own_checkpointing():
    model, x = adaptive(), images(4)
    model.train()
    with at_depth(model, MIXED):
        expected = gradients(model, lambda: model(x))
    model.set_grad_checkpointing()

    def forward():
        with at_depth(model, MIXED):
            return model(x)

    assert_same(gradients(model, forward), expected)


def test_both_depths_of_one_batch_checkpointed():
    model, x = adaptive(), images(4)
    skips = (FULL, BASE)

    def forward():
        total = 0
        for skip in skips:
            with at_depth(model, skip):
                total = total + model(x)
        return total

    expected = gradients(model, forward)
    model.set_grad_checkpointing()
    assert_same(gradients(model, forward), expected)


def test_checkpointing_that_loses_the_depth_is_an_error():
    model = adaptive()
    y = torch.randn(2, 16, 8, 8, requires_grad=True)
    out = checkpoint(model.layer1, y, use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"use torch\.utils\.checkpoint with use_reentrant=False"):
        out.sum().backward()
    total = 0
    for skip in (FULL, BASE):  # the same feature map at two depths
        with at_depth(model, skip):
            total = total + checkpoint(model.layer1, y, use_reentrant=False)
    with pytest.raises(RuntimeError, match=r"at two depths, .*give each its own, x.clone\(\)"):
        total.sum().backward()
    with at_depth(model, BASE):  # without checkpointing there is nothing to confuse
        one = model.layer1(y)
    (one + model.layer1(y)).sum().backward()


# --- torch.compile --------------------------------------------------------------------------------


def tiny(family: str = "option A") -> nn.Module:
    """Four depths, few blocks."""
    if family == "vit":
        return adaptive(family)
    model = timm.create_model("resnet20_cifar", layers=(1, 2, 2), num_classes=5)
    return scramble(convert(model, AdaptiveDepth())).eval()


def test_a_compiled_network_switches():
    """By compiling anew: no guard is stale."""
    fullgraph = dynamo_reads_contexts()
    model, x = tiny(), images()
    expected = outputs(model, x)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64), torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
        for skip, right in expected.items():
            with at_depth(compiled, skip):
                torch.testing.assert_close(compiled(x), right)
        for skip, right in expected.items():
            set_depth(compiled, skip)
            torch.testing.assert_close(compiled(x), right)
    torch._dynamo.reset()


def test_an_old_torch_that_cannot_read_contexts_refuses_a_full_graph():
    if dynamo_reads_contexts():
        pytest.skip("this torch compiles the reading of a ContextVar")
    model, x = tiny(), images()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="ContextVar"):
        torch.compile(model, backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["option A", "vit"])
def test_compiled_ahead_switching_recompiles_nothing(family):
    torch._dynamo.reset()
    model, x = tiny(family), images()
    expected = outputs(model, x)
    compiled = compile_depths(model, x, backend="aot_eager", fullgraph=True)
    with torch.compiler.set_stance("fail_on_recompile"), torch.no_grad():
        for skip, right in expected.items():
            with at_depth(compiled, skip):
                torch.testing.assert_close(compiled(x), right)
            set_depth(model, skip)
            torch.testing.assert_close(compiled(x + 1 - 1), right, rtol=1e-3, atol=1e-4)
    assert [n for n, _ in compiled.named_parameters()] == [
        f"model.{n}" for n, _ in model.named_parameters()
    ]
    torch._dynamo.reset()


@pytest.mark.parametrize("inside", [torch.inference_mode, torch.enable_grad])
def test_compiled_ahead_it_serves_in_every_mode_of_its_caller(inside):
    torch._dynamo.reset()
    model = tiny()
    skips = [(False, True), (True, True)]
    compiled = compile_depths(model, images(), skips, backend="aot_eager")
    with torch.compiler.set_stance("fail_on_recompile"), inside():
        for x in (images(), images() + 1):
            for skip in skips:
                with at_depth(model, skip):
                    out = compiled(x)
                torch.testing.assert_close(out, subnet(model, skip)(x), check_stride=False)
                assert not out.requires_grad
    torch._dynamo.reset()


def test_compiled_for_training_it_follows_the_networks_mode_and_leaves_its_statistics():
    torch._dynamo.reset()
    model, x = tiny().train(), images(4)
    before = {n: b.clone() for n, b in model.named_buffers()}
    compiled = compile_depths(model, x, [(True, True)], backend="aot_eager")
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    with torch.compiler.set_stance("fail_on_recompile"), at_depth(model, (True, True)):
        compiled(x).sum().backward()
    assert model.layer2[0].block.bn1.base.weight.grad is not None
    compiled.eval()
    with at_depth(model, (True, True)), torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    torch._dynamo.reset()


def test_compiled_for_training_each_module_keeps_its_own_mode():
    """Frozen norms stay in evaluation mode while the rest of the network trains, and may thaw later."""
    torch._dynamo.reset()
    model, x = tiny().train(), images(4)
    frozen = model.layer2[0].block.bn1.base.eval()
    compiled = compile_depths(model, x, [(True, True)], backend="aot_eager")
    eager = copy.deepcopy(model)
    before = frozen.running_mean.clone()
    with torch.compiler.set_stance("fail_on_recompile"):
        for network in (model, eager):
            set_depth(network, (True, True))
        torch.testing.assert_close(compiled(x), eager(x))
    for (name, buffer), want in zip(model.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(buffer, want, msg=name)
    assert torch.equal(frozen.running_mean, before)
    compiled.train()  # the frozen one as well
    compiled(x)
    assert not torch.equal(frozen.running_mean, before)
    torch._dynamo.reset()


def test_as_many_networks_as_one_likes_are_compiled():
    """PyTorch's limits on what shares a forward would leave the last of these uncompiled."""
    torch._dynamo.reset()
    compilations = []

    def backend(graph, _inputs):
        compilations.append(graph)
        return graph

    networks = []
    with torch._dynamo.config.patch(recompile_limit=1):  # instead of eight, to compile less
        for classes in (2, 3):
            model = timm.create_model("resnet20_cifar", layers=(1, 1, 2), num_classes=classes)
            model = convert(model, AdaptiveDepth()).eval()
            networks.append(compile_depths(model, images(), backend=backend))
            assert len(compilations) == 2 * len(networks)
    torch._dynamo.reset()


@pytest.mark.slow
def test_all_depths_by_the_real_compiler():
    try:
        torch._dynamo.reset()
        torch.compile(torch.sin, dynamic=False)(torch.ones(3))
    except Exception as error:
        if "compiler" not in str(error):
            raise
        pytest.skip("no C++ compiler on this machine")
    model = scramble(timm.create_model("resnet20_cifar_adn")).eval()
    compiled = compile_depths(model, images(), backend="inductor")
    with torch.compiler.set_stance("fail_on_recompile"), torch.no_grad():
        for skip, right in outputs(model, images()).items():
            with at_depth(model, skip):
                torch.testing.assert_close(compiled(images()), right, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_what_is_compiled_is_not_moved():
    """Moved through here, the depths' buffers would stay behind."""
    compiled = compile_depths(tiny(), images(), [(True, True)], backend="eager")
    for move in (compiled.double, compiled.half, lambda: compiled.to("meta")):
        with pytest.raises(ValueError, match="move the network, and then compile_depths anew"):
            move()
    assert {t.dtype for t in compiled.parameters()} == {torch.float32}
    assert compiled.to("cpu").float() is compiled
    torch._dynamo.reset()


def test_a_depth_that_was_not_compiled_is_refused():
    model, x = tiny(), images()
    compiled = compile_depths(model, x, [(True, True), [False, False]], backend="eager")
    with pytest.raises(ValueError, match="depth TF is not compiled; compiled are TT, FF"):
        set_depth(model, (True, False)), compiled(x)
    with pytest.raises(ValueError, match="skip has 3 flags"):
        compile_depths(model, x, [(True, False, True)], backend="eager")
    torch._dynamo.reset()


# --- checkpoints ----------------------------------------------------------------------------------


def test_a_checkpoint_keeps_the_default_depth(tmp_path):
    model = scramble(timm.create_model("resnet20_cifar_adn")).eval()
    set_depth(model, MIXED)
    with at_depth(model, BASE):  # not what holds just now
        again = load(save(model, tmp_path / "net"))
    assert get_depth(again) == MIXED
    x = images()
    expected = outputs(model, x)
    with torch.no_grad():
        for skip, right in expected.items():
            with at_depth(again, skip):
                assert torch.equal(again(x), right)


@pytest.mark.parametrize(("named", "skip"), [(True, MIXED), (False, FULL), (False, BASE)])
def test_a_cut_network_is_saved_and_loaded(tmp_path, named, skip):
    if named:
        model = timm.create_model("resnet20_cifar_adn")
    else:
        model = convert(timm.create_model("resnet20_cifar"), AdaptiveDepth(skippable=(2, 1, 1)))
    cut = subnet(scramble(model).eval(), skip)
    again = load(save(cut, tmp_path / "net", classes=tuple("abcdefghij")))
    state = cut.state_dict()
    assert state.keys() == again.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in again.state_dict().items())
    with torch.no_grad():
        assert torch.equal(again(images()), cut(images()))
    assert [c.method.name for c in conversions(again)] == ["AdaptiveDepth", "Subnet"]
    with pytest.raises(ValueError, match="no adaptive depth"):
        set_depth(again, skip)
    # And once more, cut from what was loaded.
    assert load(save(again, tmp_path / "net")).state_dict().keys() == state.keys()


@pytest.mark.parametrize("name", ["resnet18_adn", "vit_tiny_patch16_adn"])
def test_a_network_of_features_is_cut_out_saved_and_loaded(tmp_path, name):
    options = {"img_size": 32} if name.startswith("vit") else {}
    model, x = scramble(timm.create_model(name, features_only=True, **options)).eval(), images()
    skip = (True, False, True, True)
    cut = subnet(model, skip)
    with torch.no_grad():
        with at_depth(model, skip):
            expected = model(x)
        for kind, network in (("whole", model), ("cut", cut)):
            again = load(save(network, tmp_path / kind, input_size=(3, 32, 32)))
            for f, g in zip(network(x), again(x), strict=True):
                assert torch.equal(f, g)
        assert all(torch.equal(f, g) for f, g in zip(cut(x), expected, strict=True))
