"""Layers with mixed weights that tests take: all kinds of convolution, in both forms."""

from __future__ import annotations

from typing import Any

from pliant.methods.condconv.layers import CondConv2d, Router

FORMS = ("fused", "experts")

KINDS: dict[str, dict[str, Any]] = {
    "1x1": {"kernel_size": 1},
    "1x1 strided": {"kernel_size": 1, "stride": 2},
    "3x3": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "grouped": {"kernel_size": 3, "groups": 2},
    "depthwise": {"kernel_size": (3, 5), "padding": (1, 2), "groups": 8},
    "same": {"kernel_size": 3, "stride": 2, "padding": "same"},
}


def layer_of(kind: str, bias: Any = "experts", double: bool = True, **options: Any) -> CondConv2d:
    """8 channels to 8 (16 where not depthwise), 4 experts, with a router."""
    out = 8 if kind == "depthwise" else 16
    layer = CondConv2d(8, out, **KINDS[kind], bias=bias, experts=4, router=Router(8, 4), **options)
    return layer.double() if double else layer
