"""Threads of PyTorch's pool, told by several Python threads at once."""

from __future__ import annotations

import threading

import pytest
import torch

from pliant.compiling import torch_threads


@pytest.fixture
def two():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def begun():
    """The number with which a new thread begins."""
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]


def test_blocks_in_several_threads_leave_the_number_that_was_there(two):
    entered, leave, seen = threading.Barrier(4), threading.Event(), []

    def call(n):
        with torch_threads(1 + n):
            entered.wait()
            seen.append((1 + n, torch.get_num_threads()))
            leave.wait()
        seen.append((2, torch.get_num_threads()))

    threads = [threading.Thread(target=call, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    entered.wait()
    leave.set()
    for thread in threads:
        thread.join()
    assert len(seen) == 6
    assert [wanted for wanted, _ in seen] == [found for _, found in seen]
    assert torch.get_num_threads() == begun() == 2


def test_blocks_within_each_other(two):
    with torch_threads(3):
        with torch_threads(1):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == begun() == 2
