"""Objectives that train both ends of an adaptive network: the super-net and the base-net.

*Specialization of Sub-paths for Adaptive Depth Networks*, arXiv 2312.16392, Algorithm 1.

Shapes in this file::

    logits  [B, classes]
    target  int64 [B] (classes) or float [B, classes] (shares)
    h       [B, C, H, W], [B, H, W, C] or [B, tokens, C]: the output of a stage
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from pliant._options import check
from pliant.methods.adaptive_depth.passes import BothPasses, run_both
from pliant.methods.adaptive_depth.switch import find_depth
from pliant.objectives import CrossEntropy, Feature, ManyPasses, StageNumbers, divergence

Positions = Literal["each", "pooled"]


@dataclass(frozen=True, kw_only=True)
class Joint(ManyPasses):
    """Cross entropy of the super-net and of the base-net, each by its labels.

    The ablation without specialization (section 4.2, Table 3): both in one step, and nothing
    that binds them. Terms: ``cross_entropy`` and ``cross_entropy_base``, weighted.

    Args:
        alpha: weight of the super-net, in (0, 1); the base-net has the rest.
        smoothing: as of `CrossEntropy`.

    Raises:
        ValueError: an option is out of its range.
    """

    endings: ClassVar[tuple[str, ...]] = ("", "_base")

    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.5  # at an end, one network would not be trained
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        check(self)

    @property
    def taught(self) -> dict[str, float]:
        """Weight of each network that learns from its labels, by the ending of its terms' names."""
        return {"": self.alpha, "_base": 1 - self.alpha}

    def check(self, network: nn.Module) -> None:
        """Refuse a network that it cannot train.

        Raises:
            ValueError: the network has no adaptive depth, or its depth is not that of the whole
                network.
        """
        skip = find_depth(network).current()
        if any(skip):
            raise ValueError(
                f"the network's depth is {skip}, and both ends of it are to be trained; first set it to "
                f"the whole network: set_depth(model, {(False,) * len(skip)})"
            )

    def run(self, network: nn.Module, x: Tensor) -> BothPasses:
        """Both passes over images `x`."""
        return run_both(network, x, ())

    def pass_logits(self, outputs: BothPasses) -> tuple[Tensor, ...]:
        """Logits of the super-net and of the base-net."""
        return outputs.logits, outputs.base_logits

    def __call__(self, outputs: BothPasses, target: Tensor) -> dict[str, Tensor]:
        """The terms, scalars in float32."""
        entropy = CrossEntropy(self.smoothing)
        (whole,), (base,) = (entropy(y, target).values() for y in self.pass_logits(outputs))
        return {"cross_entropy": self.alpha * whole, "cross_entropy_base": (1 - self.alpha) * base}


@dataclass(frozen=True, kw_only=True)
class Specialization(Joint):
    """Sub-path specialization: the base-net learns to give what the super-net gives.

    Algorithm 1: ``alpha * CE(y, y_super) + (1 - alpha) * (sum_s KL(h_super^s || h_base^s) +
    KL(y_super || y_base))``. `h^s` is what a stage gives after its last block, as a
    distribution over its channels (softmax). Terms, weighted: ``cross_entropy``,
    ``kl_stage0`` and so on (numbered as the flags of `pliant.set_depth`), ``kl_logits``.
    All are computed in float32.

    Args:
        alpha: weight of the cross entropy, in (0, 1).
        smoothing: as of `CrossEntropy`.
        detach: the super-net is only the teacher: no divergence changes it through its
            outputs. The paper does not say; its authors' later code does so.
        stages: numbers of the stages that are compared, from 0; None: all that can skip.
        positions: ``"each"``: a distribution at each spatial position or token, averaged over
            images and positions ("for every spatial dimension", section 1). ``"pooled"``: of
            the feature map's mean, which says little about early stages.
        logits: compare the outputs too.

    Raises:
        ValueError: an option is out of its range, or nothing is left that trains the base-net.

    Example:
        >>> import timm, torch, pliant
        >>> model = pliant.convert(timm.create_model("resnet20_cifar"), pliant.AdaptiveDepth())
        >>> objective = Specialization()
        >>> passes = objective.run(model, torch.randn(2, 3, 32, 32))
        >>> list(objective(passes, torch.tensor([3, 5])))
        ['cross_entropy', 'kl_stage0', 'kl_stage1', 'kl_stage2', 'kl_logits']
    """

    detach: bool = True
    stages: StageNumbers | None = None
    positions: Positions = "each"
    logits: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stages == () and not self.logits:
            raise ValueError("stages=() with logits off leaves nothing that trains the base network")

    @property
    def taught(self) -> dict[str, float]:
        """As of `Joint`; the base-net learns from the super-net alone."""
        return {"": self.alpha}

    def check(self, network: nn.Module) -> None:
        """As `Joint.check`, and for the stages.

        Raises:
            ValueError: it does not have the stages; or the last one is left out, and the
                logits too, so that the last stage's base norms would learn nothing.
        """
        super().check(network)
        flags = len(find_depth(network).current())
        for n in self.stages or ():
            if n >= flags:
                raise ValueError(f"no stage {n}; the stages that can skip are 0 to {flags - 1}")
        if self.stages is not None and not self.logits and flags - 1 not in self.stages:
            raise ValueError(
                f"stages={self.stages} with logits off do not train the base network's last stage; "
                f"add stage {flags - 1}, or the logits"
            )

    def run(self, network: nn.Module, x: Tensor) -> BothPasses:
        """Both passes over images `x`, with the stages' outputs."""
        return run_both(network, x, self.stages)

    def __call__(self, outputs: BothPasses, target: Tensor) -> dict[str, Tensor]:
        """The terms, scalars in float32."""
        entropy = CrossEntropy(self.smoothing)(outputs.logits, target)["cross_entropy"]
        terms = {"cross_entropy": self.alpha * entropy}
        rest = 1 - self.alpha
        for n, teacher in outputs.stages.items():
            terms[f"kl_stage{n}"] = rest * self._divergence(teacher, outputs.base_stages[n])
        if self.logits:
            whole, base = Feature(outputs.logits, 1), Feature(outputs.base_logits, 1)
            terms["kl_logits"] = rest * self._divergence(whole, base)
        return terms

    def _divergence(self, teacher: Feature, student: Feature) -> Tensor:
        p, q = (f.h.float().movedim(f.dim, 1) for f in (teacher, student))
        if self.positions == "pooled":
            p, q = (h.flatten(2).mean(2) if h.dim() > 2 else h for h in (p, q))
        return divergence(p.detach() if self.detach else p, q)
