"""The methods, a folder each. Adding one is its folder, and its line here."""

from __future__ import annotations

from pliant.methods import combined as combined
from pliant.methods.adaptive_depth import AdaptiveDepth, Subnet
from pliant.methods.condconv import CondConv
from pliant.methods.mixture_of_depths import MixtureOfDepths
from pliant.surgery import Method

METHODS: dict[str, type[Method]] = {
    cls.__name__: cls for cls in (MixtureOfDepths, CondConv, AdaptiveDepth, Subnet)
}
