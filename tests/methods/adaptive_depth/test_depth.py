"""Switching, listing and cutting out depths; where a switch holds and where not."""

from __future__ import annotations

import asyncio
import copy
import gc
import threading

import pytest
import torch
from torch import nn

from _adaptive import BASE, FAMILIES, FULL, MIXED, adaptive, all_skips, images, in_thread, outputs, plain
from pliant import (
    AdaptiveDepth,
    Subnet,
    at_depth,
    compile_depths,
    convert,
    depths,
    get_depth,
    measure,
    set_depth,
    subnet,
)
from pliant.anatomy import RemovedBlock
from pliant.counting import count_macs, count_parameters
from pliant.methods.adaptive_depth import AdaptiveBlock, SwitchableNorm
from pliant.methods.adaptive_depth.switch import Depth, find_depth
from pliant.surgery import conversions

# --- every depth ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_depth_is_the_cut_out_one_and_no_two_are_alike(family):
    model = adaptive(family)
    x = images()
    seen = []
    with torch.no_grad():
        every = all_skips(FAMILIES[family][3])
        for skip in every if len(every) <= 8 else [*every[:-1:5], every[-1]]:
            cut = subnet(model, skip)
            with at_depth(model, skip):
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


@pytest.mark.parametrize("family", ["option A", "vit"])
def test_a_depth_trains_as_the_network_that_is_cut_out(family):
    """Outputs, running statistics and the gradients of all tensors that the two share."""
    model = adaptive(family).double()
    for skip in all_skips(len(get_depth(model))):
        found = []
        for cut in (False, True):
            again = copy.deepcopy(model)
            tensors = {id(t): n for n, t in (*again.named_parameters(), *again.named_buffers())}
            network = (subnet(again, skip, share=True) if cut else again).train()
            with at_depth(again, skip):
                y = network(images(4).double())
            y.square().mean().backward()
            grads = {tensors[id(p)]: p.grad for p in network.parameters() if p.grad is not None}
            assert grads
            found.append({"y": y, **grads, **{f"{n} now": b for n, b in again.named_buffers()}})
        torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


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
    with at_depth(model, MIXED) as skip:
        assert skip == get_depth(model) == MIXED
        assert in_thread(lambda: get_depth(model)) == FULL
        with at_depth(model, BASE):
            assert get_depth(model) == BASE
        assert get_depth(model) == MIXED
    assert get_depth(model) == FULL


def test_a_copy_made_within_a_with_runs_as_the_original_does_there():
    model = adaptive()
    with at_depth(model, MIXED):
        copied = copy.deepcopy(model)
        (row,) = measure(copied, rounds=1, min_run_time=0)
        (same,) = measure(model, rounds=1, min_run_time=0)
    assert get_depth(copied) == MIXED
    assert row.macs == same.macs == count_macs(subnet(model, MIXED), (3, 32, 32))
    (whole,) = measure(model, rounds=1, min_run_time=0)
    assert whole.macs == count_macs(subnet(model, FULL), (3, 32, 32))


def test_an_error_inside_leaves_it_too():
    model = adaptive()
    with pytest.raises(ZeroDivisionError), at_depth(model, MIXED), at_depth(model, BASE):
        raise ZeroDivisionError
    assert get_depth(model) == FULL


def test_the_default_set_within_a_with_holds_elsewhere_and_after_it():
    model = adaptive()
    with at_depth(model, MIXED):
        set_depth(model, BASE)
        assert get_depth(model) == MIXED
        assert in_thread(lambda: get_depth(model)) == BASE
        with at_depth(model, FULL):
            assert get_depth(model) == FULL
    assert get_depth(model) == BASE


def test_flags_are_letters_or_booleans():
    model = adaptive()
    assert set_depth(model, "TFT") == MIXED == get_depth(model)
    with at_depth(model, "TTT") as skip:
        assert skip == BASE == get_depth(model)
    with torch.no_grad():
        assert torch.equal(subnet(model, "TFT")(images()), model(images()))
    assert Subnet(skip="TFT") == Subnet(skip=MIXED)


def test_set_depth_in_a_with_says_what_to_write():
    model = adaptive()
    told = r"set_depth .*'TFT'.* is no context manager; .* write: with at_depth\(model, 'TFT'\):"
    with pytest.raises(TypeError, match=told), set_depth(model, MIXED):
        pytest.fail("entered")


def test_networks_do_not_see_each_other():
    one, two = adaptive(), adaptive("vit")
    with at_depth(one, MIXED), at_depth(two, "TT"):
        assert (get_depth(one), get_depth(two)) == (MIXED, (True, True))
        with at_depth(two, "FT"):
            assert (get_depth(one), get_depth(two)) == (MIXED, (False, True))
    assert (get_depth(one), get_depth(two)) == (FULL, (False, False))


def test_what_is_not_entered_does_nothing():
    model = adaptive()
    kept = at_depth(model, MIXED)
    assert repr(kept)
    assert get_depth(model) == in_thread(lambda: get_depth(model)) == FULL
    with at_depth(model, BASE):
        del kept
        gc.collect()
        assert get_depth(model) == BASE
    assert get_depth(model) == in_thread(lambda: get_depth(model)) == FULL


def test_left_in_another_order_nothing_stays():
    model = adaptive()
    one, two = at_depth(model, MIXED), at_depth(model, BASE)
    one.__enter__(), two.__enter__()
    one.__exit__(None, None, None)
    assert get_depth(model) == BASE
    two.__exit__(None, None, None)
    assert get_depth(model) == FULL


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
                with at_depth(model, FULL):
                    pass

    def work(skip: tuple[bool, ...]) -> None:
        barrier.wait()
        with torch.no_grad():
            for _ in range(3):
                with at_depth(model, skip):
                    first = model(x)
                    with at_depth(model, BASE):
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
        with at_depth(model, skip):
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
        with at_depth(model, MIXED):
            task = asyncio.create_task(started_within())
        assert get_depth(model) == FULL
        assert await task == MIXED

    asyncio.run(main())
    assert get_depth(model) == FULL


# --- what cannot be switched says so --------------------------------------------------------------


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        (
            (True,) * 2,
            r"skip has 2 flags, \(True, True\); this network has 3: give 3, such as 'TTF' or \(True",
        ),
        ("TFTF", r"skip has 4 flags, 'TFTF'; this network has 3: give 3, such as 'TTF'"),
        ((), r"skip is \(\); give one flag for each stage that can skip, such as 'TTF' or \(True, True, F"),
        ("", r"skip is ''; give one flag"),
        ((1, 0, 1), r"skip is \(1, 0, 1\); give one flag"),
        ("TxT", r"skip is 'TxT'; give one flag for each stage that can skip, such as 'TTF'"),
        (True, "skip is True; give one flag"),
    ],
)
def test_wrong_flags(skip, message):
    model = adaptive()
    for call in (set_depth, at_depth, subnet):
        with pytest.raises(ValueError, match=message):
            call(model, skip)
    assert get_depth(model) == FULL


@pytest.mark.parametrize(
    ("skips", "message"),
    [("TFT", r"skips is 'TFT'; give a list of depths, such as \['TFT'\]"), ([], "skips is empty")],
)
def test_wrong_depths(skips, message):
    with pytest.raises(ValueError, match=message):
        compile_depths(adaptive(), images(), skips)


def test_networks_without_depth_or_with_two():
    model = adaptive()
    for lacking in (plain("option A"), subnet(model, MIXED), nn.Linear(1, 1)):
        for call in (
            get_depth,
            depths,
            lambda m: set_depth(m, FULL),
            lambda m: at_depth(m, FULL),
            lambda m: subnet(m, FULL),
        ):
            with pytest.raises(ValueError, match="has no adaptive depth: convert it by"):
                call(lacking)
    two = nn.ModuleList([model, adaptive()])
    with pytest.raises(ValueError, match="ModuleList holds 2 networks of adaptive depth; give one of them"):
        set_depth(two, FULL)
    one = nn.Sequential(nn.Identity(), model)
    with at_depth(one, MIXED):
        assert get_depth(model) == MIXED


@pytest.mark.parametrize("family", FAMILIES)
def test_the_depth_is_found_without_entering_the_blocks(family):
    """It is the one that a search through all modules finds, in a wrapper and in a copy too."""
    model = adaptive(family)
    for network in (model, nn.Sequential(nn.Identity(), model), copy.deepcopy(model)):
        (known,) = [m for m in network.modules() if isinstance(m, Depth)]
        assert find_depth(network) is known
    entered = []
    for block in (m for m in model.modules() if isinstance(m, AdaptiveBlock)):
        block.block._modules = Watched(block.block._modules, entered)
    set_depth(model, "T" * len(find_depth(model).skip))
    assert entered == []


class Watched(dict):
    """The children of a module, which note that somebody went through them."""

    def __init__(self, children, entered):
        super().__init__(children)
        self.entered = entered

    def values(self):
        self.entered.append(self)
        return super().values()


def test_two_adaptive_networks_in_one_are_refused():
    both = nn.ModuleList([adaptive(), adaptive()])
    with pytest.raises(ValueError, match="holds 2 networks of adaptive depth; give one of them"):
        set_depth(both, FULL)
    assert set_depth(nn.ModuleList([both[0], both[0]]), FULL) == FULL
