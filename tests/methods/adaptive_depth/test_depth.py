"""Switching, listing and cutting out depths; where a switch holds and where not."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import gc
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

from _adaptive import BASE, FAMILIES, FULL, MIXED, adaptive, all_skips, images, in_thread, outputs, plain
from pliant import AdaptiveDepth, convert, depths, get_depth, measure, set_depth, subnet
from pliant.anatomy import RemovedBlock
from pliant.counting import count_macs, count_parameters
from pliant.methods.adaptive_depth import AdaptiveBlock, SwitchableNorm
from pliant.methods.adaptive_depth.switch import Depth, check_skip
from pliant.surgery import conversions

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
