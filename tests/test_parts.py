"""The questions that parts answer, and the answers of a part that answers nothing."""

from __future__ import annotations

import torch
from torch import nn

from pliant.parts import Part, parts, replace_parts


class Doubled(Part):
    """A part that is nothing special."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(2, 2, 1)

    def forward(self, x):
        return 2 * self.inner(x)


class Around(Part):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Doubled()

    def forward(self, x):
        return self.inner(x)


def test_a_part_that_answers_nothing_is_a_plain_module():
    part = Doubled()
    assert [part.export_form(target, None) for target in ("program", "onnx", "openvino")] == [part] * 3
    assert part.no_export() == ""
    assert (part.fast_form(), part.onnx_operator(), part.ranking(), part.inplace) == (None,) * 4
    assert not part.takes_norm(torch.zeros(1, 2, 3, 3))
    with part.counted():
        pass


def test_parts_are_replaced_where_they_stand():
    network = nn.Sequential(Around(), Doubled())
    assert list(parts(network)) == ["0", "0.inner", "1"]
    asked = []

    def form(path, part):
        asked.append(path)
        return nn.Identity() if path in ("0", "1") else None

    assert replace_parts(network, form) is network
    assert asked == ["0", "1"]  # what is inside the part that went is not asked for
    assert [type(m) for m in network] == [nn.Identity] * 2
    network = nn.Sequential(Around())
    replace_parts(network, lambda path, part: nn.Identity() if path == "0.inner" else None)
    assert isinstance(network[0].inner, nn.Identity)


def test_a_network_that_is_one_part():
    part = Doubled()
    assert replace_parts(part, lambda path, part: None) is part
    assert isinstance(replace_parts(part, lambda path, part: nn.Identity()), nn.Identity)
