"""Variants of Mixture-of-Depths that were tried, and the control of each.

Each changes options of `MixtureOfDepths` as it stands in the paper (c = 16, score order, first k
channels). The rows say what they are worth. Most were not shown to be better than no block, and their
code was removed: their rows stay as a finding, and nothing trains them again (`Variant.gone`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pliant.methods.mixture_of_depths import MixtureOfDepths
from pliant.methods.mixture_of_depths.recipes import CONTROLS as MOD_CONTROLS
from pliant.methods.mixture_of_depths.recipes import REMOVED

SCORE_ORDER, _, _, _, FIRST, _ = MOD_CONTROLS
LEAST = "plain, 1-1-1 blocks"  # what `blocks="all"` leaves


@dataclass(frozen=True)
class Variant:
    """A variant.

    Attributes:
        options: that it changes.
        why: what it is tried for.
        control: label of the same network without that, where there is one; by default the paper's.
        selects: it does; else it is a control itself.
    """

    options: Mapping[str, Any]
    why: str
    control: str = SCORE_ORDER
    selects: bool = True

    @property
    def gone(self) -> bool:
        """Whether the method no longer has these options; then the variant cannot be built."""
        try:
            MixtureOfDepths.current_options(self.options)
        except ValueError:
            return True
        return False


_STEADY = {"order": "index", "fusion": "original"}
_SHARP = {"temperature": 0.1}
_SOFT = {**_SHARP, "straight_through": True}
_BY_STAGE = {"c": [16, 4, 2]}
_SEPARABLE = {"c": 2, "core": "separable"}

# The most promising first: an experiment that is cut short has those.
VARIANTS: dict[str, Variant] = {
    "gate of the map": Variant(
        {"gate": "map"},
        "the scores are paid for, so let them weigh every channel; then every score learns",
        "gate of the map, first k",
    ),
    "gate of the map, first k": Variant(
        {"gate": "map", "selection": "first"},
        "the same gate, nothing selected",
        FIRST,
        selects=False,
    ),
    "separable": Variant(
        {**_SEPARABLE, **_STEADY},
        "half of the channels for fewer operations: a depthwise and a 1x1 convolution",
        "separable, first k",
    ),
    "separable, first k": Variant(
        {**_SEPARABLE, "selection": "first"},
        "the same core, nothing selected and nothing gathered",
        FIRST,
        selects=False,
    ),
    "c by stage": Variant(
        {**_BY_STAGE, **_STEADY},
        "a wider core where the maps are small, and gathering is cheap",
        "c by stage, first k",
    ),
    "c by stage, first k": Variant(
        {**_BY_STAGE, "selection": "first"},
        "the same cores, nothing selected",
        FIRST,
        selects=False,
    ),
    "last stage only, gate of the map": Variant(
        {"c": [0, 0, 2], "gate": "map", **_STEADY},
        "no block where the maps are large, a wide one with a gate where they are small",
        REMOVED,
    ),
    "static": Variant(
        {"selection": "static", **_SOFT, **_STEADY},
        "which channels is learned, and constant once trained: no selector in the deployed network",
        FIRST,
    ),
    "temperature": Variant(
        _SHARP, "scores of a trained network were all near a half: they chose, and weighed nothing"
    ),
    "straight-through": Variant(
        _SOFT, "the ranking learns from channels that it did not choose", "temperature"
    ),
    "straight-through, steady": Variant(
        {**_SOFT, **_STEADY},
        "the same, each filter of the core at its own channels",
        "index order, original",
    ),
    "index order, original": Variant(
        _STEADY, "each filter of the core sees a steadier input, and adds to the channels it came from"
    ),
    "inner shortcut": Variant({"inner_shortcut": True}, "the core changes what it moves, as a block does"),
    "selector with a bias": Variant(
        {"selector_bias": True}, "channels that are useful for every image are kept selected"
    ),
    "no score": Variant(
        {"gate": "none", **_SOFT},
        "the score multiplies nothing: the selector learns to rank and no more",
        "straight-through",
    ),
    "all blocks": Variant(
        {"blocks": "all", **_STEADY},
        "all positions but each stage's first: twice as many blocks, a cheaper network",
        LEAST,
    ),
    "all blocks, one selection": Variant(
        {"blocks": "all", "share_selection": True, **_STEADY},
        "a stage's blocks see the same channels, so one selector ranks them, once",
        "all blocks",
    ),
    "all blocks, one random selection": Variant(
        {"blocks": "all", "share_selection": True, "selection": "random", **_STEADY},
        "the same, its channels drawn for each image",
        LEAST,
        selects=False,
    ),
    "gate of the map, c by stage": Variant(
        {**_BY_STAGE, **_STEADY, "gate": "map"},
        "the gate and the wider cores at once",
        "gate of the map, c by stage, first k",
    ),
    "gate of the map, c by stage, first k": Variant(
        {**_BY_STAGE, "gate": "map", "selection": "first"},
        "the same gate and cores, nothing selected",
        FIRST,
        selects=False,
    ),
}
