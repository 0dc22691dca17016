"""Switching, listing, cutting out and compiling depths; where a switch holds and where not."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import gc
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from timm.models import checkpoint_seq
from torch import nn
from torch.utils.checkpoint import checkpoint

from adaptive import FAMILIES, adaptive, all_skips, images, plain, scramble
from pliant import AdaptiveDepth, convert, depths, get_depth, load, measure, save, set_depth, subnet
from pliant.anatomy import RemovedBlock
from pliant.depth import compile_depths
from pliant.measuring.macs import count_macs, count_parameters
from pliant.methods.adaptive_depth import AdaptiveBlock, SwitchableNorm
from pliant.surgery import conversions
from pliant.switch import Depth, check_skip

FULL, BASE, MIXED = (False,) * 3, (True,) * 3, (True, False, True)


def outputs(model, x, skips=None) -> dict[tuple[bool, ...], torch.Tensor]:
    """What each depth gives, by cutting it out."""
    with torch.no_grad():
        return {skip: subnet(model, skip)(x) for skip in skips or all_skips(len(get_depth(model)))}


def in_thread(work):
    """What `work` gives in another thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


# --- every depth ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_depth_is_the_cut_out_one_and_no_two_are_alike(family):
    model = adaptive(family)
    x = images()
    seen = []
    with torch.no_grad():
        for skip in all_skips(FAMILIES[family][3]):
            cut = subnet(model, skip)
            with set_depth(model, skip):
                out = model(x)
            assert torch.equal(cut(x), out)
            assert not any(isinstance(m, (AdaptiveBlock, SwitchableNorm, Depth)) for m in cut.modules())
            assert not any(torch.equal(out, other) for other in seen)
            seen.append(out)


@pytest.mark.parametrize("family", ["option A", "mobilenetv2", "vit", "convnext, conv"])
@pytest.mark.parametrize("train", [False, True])
def test_a_cut_network_has_no_dead_weights(family, train):
    model = adaptive(family)
    flags = len(get_depth(model))
    for skip in ((False,) * flags, (True,) * flags, (True, *(False,) * (flags - 1))):
        cut = subnet(model, skip).train(train)
        cut(images(4)).square().mean().backward()
        assert [n for n, p in cut.named_parameters() if p.grad is None] == []


def test_a_cut_network_has_its_own_tensors_unless_it_shares():
    model = adaptive()
    mine = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    for skip in all_skips(3):
        own, shared = subnet(model, skip), subnet(model, skip, share=True)
        assert not mine & {t.data_ptr() for t in (*own.parameters(), *own.buffers())}
        assert {t.data_ptr() for t in (*shared.parameters(), *shared.buffers())} <= mine
        assert shared.state_dict().keys() == own.state_dict().keys()
        with torch.no_grad():
            assert torch.equal(own(images()), shared(images()))
    shared.fc.weight.data.zero_()
    assert not model.fc.weight.any()
    assert own.fc.weight.any()


def test_cutting_leaves_the_network_alone():
    model = adaptive()
    before = [(path, id(m)) for path, m in model.named_modules()]
    record = conversions(model)
    subnet(model, BASE), subnet(model, BASE, share=True), depths(model)
    assert [(path, id(m)) for path, m in model.named_modules()] == before
    assert conversions(model) == record
    assert get_depth(model) == FULL


def test_what_is_left_of_a_skipped_block():
    cut = subnet(adaptive(), (False, True, False))
    kinds = [type(block).__name__ for stage in (cut.layer1, cut.layer2) for block in stage]
    assert kinds == ["BasicBlock"] * 5 + ["RemovedBlock"]
    assert isinstance(cut.layer2[2], RemovedBlock)
    assert isinstance(cut.layer2[0].bn1, nn.BatchNorm2d)


def test_depths_are_listed_with_their_counts():
    model = adaptive()
    found = depths(model)
    assert [d.skip for d in found] == all_skips(3)
    for d in found:
        cut = subnet(model, d.skip)
        assert (d.parameters, d.macs) == (count_parameters(cut), count_macs(cut, (3, 32, 32)))
    assert len({d.macs for d in found}) == 4, "a block costs the same in each stage"
    assert found[0].macs - found[-1].macs == 3 * 2 * 9 * 16 * 16 * 32 * 32
    assert depths(model, (3, 16, 16))[0].macs < found[0].macs
    bare = convert(nn.Sequential(plain("basic").layer1), AdaptiveDepth())
    assert {d.macs for d in depths(bare)} == {None}


# --- where a switch holds -------------------------------------------------------------------------


def test_statement_sets_the_default_for_all_threads():
    model = adaptive()
    set_depth(model, MIXED)
    assert get_depth(model) == MIXED
    assert in_thread(lambda: get_depth(model)) == MIXED
    set_depth(model, list(FULL))
    assert in_thread(lambda: get_depth(model)) == FULL


def test_with_holds_here_only_and_gives_the_flags():
    model = adaptive()
    with set_depth(model, MIXED) as skip:
        assert skip == get_depth(model) == MIXED
        assert in_thread(lambda: get_depth(model)) == FULL
        with set_depth(model, BASE):
            assert get_depth(model) == BASE
        assert get_depth(model) == MIXED
    assert get_depth(model) == FULL


def test_a_copy_made_within_a_with_runs_as_the_original_does_there():
    model = adaptive()
    with set_depth(model, MIXED):
        copied = copy.deepcopy(model)
        (row,) = measure(copied, rounds=1, min_run_time=0)
        (same,) = measure(model, rounds=1, min_run_time=0)
    assert get_depth(copied) == MIXED
    assert row.macs == same.macs == count_macs(subnet(model, MIXED), (3, 32, 32))
    (whole,) = measure(model, rounds=1, min_run_time=0)
    assert whole.macs == count_macs(subnet(model, FULL), (3, 32, 32))


def test_an_error_inside_leaves_it_too():
    model = adaptive()
    with pytest.raises(ZeroDivisionError), set_depth(model, MIXED), set_depth(model, BASE):
        raise ZeroDivisionError
    assert get_depth(model) == FULL


def test_statement_within_a_with_holds_there_and_after_it():
    model = adaptive()
    with set_depth(model, MIXED):
        set_depth(model, BASE)
        assert get_depth(model) == BASE
        assert in_thread(lambda: get_depth(model)) == BASE
        with set_depth(model, MIXED):
            assert get_depth(model) == MIXED
        assert get_depth(model) == BASE
        set_depth(model, (False, True, False))
        assert get_depth(model) == (False, True, False)
    assert get_depth(model) == (False, True, False)


def test_networks_do_not_see_each_other():
    one, two = adaptive(), adaptive("vit")
    with set_depth(one, MIXED), set_depth(two, (True, True)):
        assert (get_depth(one), get_depth(two)) == (MIXED, (True, True))
        set_depth(two, (False, True))
        assert get_depth(one) == MIXED
    assert (get_depth(one), get_depth(two)) == (FULL, (False, True))


def test_a_switch_kept_in_a_variable_holds_here_until_it_is_dropped():
    model = adaptive()
    kept = set_depth(model, MIXED)
    assert get_depth(model) == MIXED
    assert in_thread(lambda: get_depth(model)) == FULL, "it may yet be entered"
    del kept
    gc.collect()
    assert in_thread(lambda: get_depth(model)) == MIXED


def test_the_next_switch_publishes_a_kept_one():
    model = adaptive()
    kept = set_depth(model, MIXED)
    with set_depth(model, BASE):
        assert get_depth(model) == BASE
        assert in_thread(lambda: get_depth(model)) == MIXED
    assert get_depth(model) == MIXED
    del kept
    assert get_depth(model) == MIXED


def test_what_an_interactive_prompt_shows_and_keeps_is_the_default():
    model = adaptive()
    shown = set_depth(model, MIXED)
    assert repr(shown) == "depth (True, False, True)"
    assert in_thread(lambda: get_depth(model)) == MIXED
    set_depth(model, BASE)
    assert repr(shown) == "depth (True, False, True)"
    del shown
    assert get_depth(model) == BASE, "it was published once"


def test_a_switch_thrown_away_in_another_thread_becomes_the_default():
    model = adaptive()
    box = [set_depth(model, MIXED)]
    in_thread(box.clear)
    gc.collect()
    assert in_thread(lambda: get_depth(model)) == MIXED
    set_depth(model, BASE)
    assert get_depth(model) == BASE, "nothing of the first one is left here"


def test_a_switch_can_be_entered_again_and_within_itself():
    model = adaptive()
    switch = set_depth(model, MIXED)
    for _ in range(2):
        with switch:
            assert get_depth(model) == MIXED
            with set_depth(model, BASE), switch:
                assert get_depth(model) == MIXED
            assert get_depth(model) == MIXED
        assert get_depth(model) == FULL
    del switch
    assert in_thread(lambda: get_depth(model)) == FULL


def test_a_switch_entered_in_another_thread_holds_there():
    model = adaptive()
    box = [set_depth(model, MIXED)]

    def work():
        with box[0]:
            return get_depth(model)

    assert in_thread(work) == MIXED
    assert get_depth(model) == FULL
    box.clear()
    assert get_depth(model) == FULL


def test_left_in_another_order_or_context_nothing_stays():
    model = adaptive()
    one, two = set_depth(model, MIXED), set_depth(model, BASE)  # the second publishes the first
    set_depth(model, FULL)
    one.__enter__(), two.__enter__()
    one.__exit__(None, None, None)
    assert get_depth(model) == BASE
    two.__exit__(None, None, None)
    assert get_depth(model) == FULL
    one.__enter__()
    contextvars.Context().run(one.__exit__, None, None, None)
    assert get_depth(model) == FULL


def test_at_the_end_of_the_program_nothing_is_said():
    program = (
        "import timm, pliant\n"
        "model = timm.create_model('resnet20_cifar_adn')\n"
        "kept = pliant.set_depth(model, (True, True, True))\n"
        "inside = pliant.set_depth(model, (True, True, False)).__enter__()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


# --- threads and tasks ----------------------------------------------------------------------------


def test_threads_at_all_depths_at_once_get_what_they_asked_for():
    model, x = adaptive(), images()
    expected = outputs(model, x)
    skips = [*all_skips(3)] * 2
    barrier, stop, wrong = threading.Barrier(len(skips) + 1), threading.Event(), []

    def restless() -> None:
        """Change the default, and enter and leave depths, all the time."""
        barrier.wait()
        while not stop.is_set():
            for skip in (BASE, FULL, MIXED):
                set_depth(model, skip)
                with set_depth(model, FULL):
                    pass

    def work(skip: tuple[bool, ...]) -> None:
        barrier.wait()
        with torch.no_grad():
            for _ in range(3):
                with set_depth(model, skip):
                    first = model(x)
                    with set_depth(model, BASE):
                        inner = model(x)
                    second = model(x)
                for out, right in ((first, skip), (inner, BASE), (second, skip)):
                    if not torch.equal(out, expected[right]):
                        wrong.append(skip)

    threads = [threading.Thread(target=work, args=(skip,)) for skip in skips]
    other = threading.Thread(target=restless)
    for thread in (*threads, other):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    other.join()
    assert wrong == []


def test_a_forward_has_one_depth_in_each_stage_whatever_is_switched_meanwhile():
    model, x = adaptive(), images()
    expected = outputs(model, x)
    skip = (False, True, False)

    def switch(*_):
        set_depth(model, BASE)

    # The default changes after the second stage's first block.
    handle = model.layer2[0].register_forward_hook(switch)
    set_depth(model, skip)
    with torch.no_grad():
        out = model(x)
    handle.remove()
    assert torch.equal(out, expected[False, True, True])


def test_tasks_do_not_see_each_other_and_keep_what_they_started_with():
    model, x = adaptive(), images()
    expected = outputs(model, x)

    async def serve(skip):
        with set_depth(model, skip):
            for _ in range(3):
                await asyncio.sleep(0)
                with torch.no_grad():
                    assert torch.equal(model(x), expected[skip])
                assert await asyncio.to_thread(get_depth, model) == skip

    async def started_within():
        await asyncio.sleep(0.01)
        return get_depth(model)

    async def main():
        await asyncio.gather(*(serve(skip) for skip in all_skips(3)))
        with set_depth(model, MIXED):
            task = asyncio.create_task(started_within())
        assert get_depth(model) == FULL
        assert await task == MIXED
        kept = set_depth(model, BASE)
        task = asyncio.create_task(started_within())
        del kept
        set_depth(model, FULL)
        assert await task == FULL, "a default is no one's own"

    asyncio.run(main())
    assert get_depth(model) == FULL


# --- what cannot be switched says so --------------------------------------------------------------


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        ((True,) * 2, r"skip has 2 flags, \(True, True\); the network has 3"),
        ((), r"skip has 0 flags, \(\); the network has 3"),
        ((1, 0, 1), r"skip must hold True or False for each of 3 stages, not \[1, 0, 1\]"),
        ("TFT", r"skip must hold True or False for each of 3 stages, not \['T', 'F', 'T'\]"),
    ],
)
def test_wrong_flags(skip, message):
    model = adaptive()
    for call in (set_depth, subnet):
        with pytest.raises(ValueError, match=message):
            call(model, skip)
    assert get_depth(model) == FULL
    with pytest.raises(ValueError, match="skip must hold True or False for each of 3 stages, not True"):
        check_skip(True, 3)


def test_networks_without_depth_or_with_two():
    model = adaptive()
    for lacking in (plain("option A"), subnet(model, MIXED), nn.Linear(1, 1)):
        for call in (get_depth, depths, lambda m: set_depth(m, FULL), lambda m: subnet(m, FULL)):
            with pytest.raises(ValueError, match="has no adaptive depth: convert it by"):
                call(lacking)
    two = nn.ModuleList([model, adaptive()])
    with pytest.raises(ValueError, match="ModuleList holds 2 networks of adaptive depth; give one of them"):
        set_depth(two, FULL)
    one = nn.Sequential(nn.Identity(), model)
    with set_depth(one, MIXED):
        assert get_depth(model) == MIXED


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_traced_and_exported_networks_have_one_depth_and_refuse_others():
    model, x = adaptive(), images()
    expected = outputs(model, x)
    with set_depth(model, MIXED), torch.no_grad():
        traced = torch.jit.trace(model, x)
        exported = torch.export.export(model, (x,)).module()
    cut = torch.export.export(subnet(model, MIXED), (x,))
    for frozen in (traced, exported, cut.module()):
        with torch.no_grad(), set_depth(model, BASE):
            assert torch.equal(frozen(x), expected[MIXED])
        with pytest.raises(ValueError, match="exported has one depth for ever: switch the network that it"):
            set_depth(frozen, BASE)
    # What was cut out takes its own weights only along.
    names = dict(cut.named_parameters())
    assert len(names) == len(list(subnet(model, MIXED).parameters())) < len(list(model.parameters()))


def test_replicas_of_data_parallel_run_at_the_depth_of_their_caller():
    model, x = adaptive(), images()
    block = model.layer1[0]
    with set_depth(model, BASE):
        replica = block._replicate_for_data_parallel()
    replica.block = block.block
    with torch.no_grad():
        features = model.conv1(x)
        with set_depth(model, BASE):
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
        with set_depth(model, at):
            y = start.clone().requires_grad_(True)
            return checkpoint_seq(blocks, y, every=every) if checkpointed else nn.Sequential(*blocks)(y)

    for at in (skip, (True,) * len(skip), (False,) * len(skip)):
        expected = gradients(model, lambda at=at: forward(at, False))
        assert_same(gradients(model, lambda at=at: forward(at, True)), expected)


def test_timms_own_checkpointing():
    model, x = adaptive(), images(4)
    model.train()
    with set_depth(model, MIXED):
        expected = gradients(model, lambda: model(x))
    model.set_grad_checkpointing()

    def forward():
        with set_depth(model, MIXED):
            return model(x)

    assert_same(gradients(model, forward), expected)


def test_both_depths_of_one_batch_checkpointed():
    model, x = adaptive(), images(4)
    skips = (FULL, BASE)

    def forward():
        total = 0
        for skip in skips:
            with set_depth(model, skip):
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
        with set_depth(model, skip):
            total = total + checkpoint(model.layer1, y, use_reentrant=False)
    with pytest.raises(RuntimeError, match=r"at two depths, .*give each its own, x.clone\(\)"):
        total.sum().backward()
    with set_depth(model, BASE):  # without checkpointing there is nothing to confuse
        one = model.layer1(y)
    (one + model.layer1(y)).sum().backward()


# --- torch.compile --------------------------------------------------------------------------------


def tiny(family: str = "option A") -> nn.Module:
    """Four depths, few blocks."""
    if family == "vit":
        return adaptive(family)
    model = timm.create_model("resnet20_cifar", layers=(1, 2, 2), num_classes=5)
    return scramble(convert(model, AdaptiveDepth())).eval()


def dynamo_reads_contexts() -> bool:
    """Whether `torch.compile` can read a `ContextVar`: torch 2.11 cannot."""
    torch._dynamo.reset()
    variable = contextvars.ContextVar("tried", default=1)
    try:
        torch.compile(lambda x: x * variable.get(), backend="eager", fullgraph=True)(torch.ones(1))
    except torch._dynamo.exc.Unsupported:
        return False
    return True


@pytest.mark.parametrize("statement", [True, False])
def test_a_compiled_network_switches(statement):
    """By compiling anew: no guard is stale."""
    fullgraph = dynamo_reads_contexts()
    model, x = tiny(), images()
    expected = outputs(model, x)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64), torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
        for skip in [*expected, *expected]:
            if statement:
                set_depth(compiled, skip)
                out = compiled(x)
            else:
                with set_depth(compiled, skip):
                    out = compiled(x)
            torch.testing.assert_close(out, expected[skip])
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
            with set_depth(compiled, skip):
                torch.testing.assert_close(compiled(x), right)
            set_depth(model, skip)
            torch.testing.assert_close(compiled(x + 1 - 1), right, rtol=1e-3, atol=1e-4)
    assert [n for n, _ in compiled.named_parameters()] == [
        f"model.{n}" for n, _ in model.named_parameters()
    ]
    torch._dynamo.reset()


@pytest.mark.parametrize("inside", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_compiled_ahead_it_serves_in_every_mode_of_its_caller(inside):
    torch._dynamo.reset()
    model = tiny()
    skips = [(False, True), (True, True)]
    compiled = compile_depths(model, images(), skips, backend="aot_eager")
    with torch.compiler.set_stance("fail_on_recompile"), inside():
        for x in (images(), images() + 1):
            for skip in skips:
                with set_depth(model, skip):
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
    with torch.compiler.set_stance("fail_on_recompile"), set_depth(model, (True, True)):
        compiled(x).sum().backward()
    assert model.layer2[0].block.bn1.base.weight.grad is not None
    compiled.eval()
    with set_depth(model, (True, True)), torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    torch._dynamo.reset()


def test_as_many_networks_as_one_likes_are_compiled():
    """PyTorch's limits on what shares a forward would leave the last of these uncompiled."""
    torch._dynamo.reset()
    compilations = []

    def backend(graph, _inputs):
        compilations.append(graph)
        return graph

    networks = []
    for classes in range(2, 7):
        model = timm.create_model("resnet20_cifar", layers=(1, 2, 2), num_classes=classes)
        model = convert(model, AdaptiveDepth()).eval()
        networks.append(compile_depths(model, images(), backend=backend))
        assert len(compilations) == 4 * len(networks)
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
            with set_depth(model, skip):
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
    with pytest.raises(ValueError, match=r"depth \(True, False\) is not compiled; compiled are \[\(True"):
        set_depth(model, (True, False)), compiled(x)
    with pytest.raises(ValueError, match="skip has 3 flags"):
        compile_depths(model, x, [(True, False, True)], backend="eager")
    torch._dynamo.reset()


# --- checkpoints ----------------------------------------------------------------------------------


def test_a_checkpoint_keeps_the_default_depth(tmp_path):
    model = scramble(timm.create_model("resnet20_cifar_adn")).eval()
    set_depth(model, MIXED)
    with set_depth(model, BASE):  # not what holds just now
        again = load(save(model, tmp_path / "net"))
    assert get_depth(again) == MIXED
    x = images()
    expected = outputs(model, x)
    with torch.no_grad():
        for skip, right in expected.items():
            with set_depth(again, skip):
                assert torch.equal(again(x), right)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("skip", [FULL, BASE, MIXED])
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
        with set_depth(model, skip):
            expected = model(x)
        for kind, network in (("whole", model), ("cut", cut)):
            again = load(save(network, tmp_path / kind, input_size=(3, 32, 32)))
            for f, g in zip(network(x), again(x), strict=True):
                assert torch.equal(f, g)
        assert all(torch.equal(f, g) for f, g in zip(cut(x), expected, strict=True))
