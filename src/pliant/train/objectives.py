"""What is minimised: an objective gives named terms, whose sum is the loss.

Most need one pass of the network. Those of adaptive networks need two, of the whole
network (the super-net) and of the base network: *Specialization of Sub-paths for Adaptive
Depth Networks*, arXiv 2312.16392, Algorithm 1.

Shapes in this file::

    logits  [B, classes]
    target  int64 [B] (classes) or float [B, classes] (shares)
    h       [B, C, H, W], [B, H, W, C] or [B, tokens, C]: the output of a stage
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from pliant.methods.adaptive_depth.depth import get_depth
from pliant.methods.adaptive_depth.passes import BothPasses, Feature, run_both

Positions = Literal["each", "pooled"]


class Objective(Protocol):
    """A rule from outputs and targets to the terms of a loss."""

    def __call__(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Name each term, a scalar. Their sum is minimised; each is logged and watched."""


@dataclass(frozen=True)
class CrossEntropy:
    """Cross entropy, with smoothed labels if asked; targets may be mixed already.

    Args:
        smoothing: share of the target that is spread over all classes, in [0, 1).

    Example:
        >>> import torch
        >>> terms = CrossEntropy(smoothing=0.1)(torch.zeros(2, 4), torch.tensor([0, 3]))
        >>> {name: round(float(term), 4) for name, term in terms.items()}
        {'cross_entropy': 1.3863}
    """

    smoothing: float = 0.0

    def __call__(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """One term, the mean over the batch, computed in float32."""
        return {"cross_entropy": F.cross_entropy(logits.float(), target, label_smoothing=self.smoothing)}


@dataclass(frozen=True, kw_only=True)
class Joint:
    """Cross entropy of the super-net and of the base-net, each by its labels.

    The ablation without specialization (section 4.2, Table 3): both in one step, and nothing
    that binds them. Terms: ``cross_entropy`` and ``cross_entropy_base``, weighted.

    Args:
        alpha: weight of the super-net, in (0, 1); the base-net has the rest.
        smoothing: as of `CrossEntropy`.

    Raises:
        ValueError: an option is out of its range.
    """

    alpha: float = 0.5
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)):
            raise ValueError(f"alpha must be a number, not {self.alpha!r}")
        if not 0 < self.alpha < 1:
            raise ValueError(
                f"alpha must be between 0 and 1, not {self.alpha}: at either end one of the two networks "
                f"would not be trained"
            )

    @property
    def taught(self) -> dict[str, float]:
        """Weight of each network that learns from its labels, by the ending of its terms' names."""
        return {"": self.alpha, "_base": 1 - self.alpha}

    def check(self, network: nn.Module) -> None:
        """Refuse a network that it cannot train.

        Raises:
            ValueError: the network has no adaptive depth, or runs at another depth than the
                whole one unless told.
        """
        skip = get_depth(network)
        if any(skip):
            raise ValueError(
                f"the network's depth is {skip}, and both ends of it are to be trained; first set it to "
                f"the whole network: set_depth(model, {(False,) * len(skip)})"
            )

    def run(self, network: nn.Module, x: Tensor) -> BothPasses:
        """Both passes over images `x`."""
        return run_both(network, x, ())

    def __call__(self, passes: BothPasses, target: Tensor) -> dict[str, Tensor]:
        """The terms, scalars in float32."""
        entropy = CrossEntropy(self.smoothing)
        (whole,), (base,) = (entropy(y, target).values() for y in (passes.logits, passes.base_logits))
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
    stages: tuple[int, ...] | None = None
    positions: Positions = "each"
    logits: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("detach", "logits"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, not {getattr(self, name)!r}")
        if self.positions not in get_args(Positions):
            raise ValueError(f"positions must be each or pooled, not {self.positions!r}")
        if self.stages is None:
            return
        object.__setattr__(self, "stages", stage_numbers(self.stages))
        if not (self.stages or self.logits):
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
        flags = len(get_depth(network))
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

    def __call__(self, passes: BothPasses, target: Tensor) -> dict[str, Tensor]:
        """The terms, scalars in float32."""
        entropy = CrossEntropy(self.smoothing)(passes.logits, target)["cross_entropy"]
        terms = {"cross_entropy": self.alpha * entropy}
        rest = 1 - self.alpha
        for n, teacher in passes.stages.items():
            terms[f"kl_stage{n}"] = rest * self._divergence(teacher, passes.base_stages[n])
        if self.logits:
            whole, base = Feature(passes.logits, 1), Feature(passes.base_logits, 1)
            terms["kl_logits"] = rest * self._divergence(whole, base)
        return terms

    def _divergence(self, teacher: Feature, student: Feature) -> Tensor:
        p, q = (
            _pooled(f.h.float(), f.dim) if self.positions == "pooled" else f.h.float().movedim(f.dim, 1)
            for f in (teacher, student)
        )
        return divergence(p.detach() if self.detach else p, q)


def stage_numbers(stages: Any) -> tuple[int, ...]:
    """An option's numbers of stages as a tuple; JSON knows lists only.

    Raises:
        ValueError: not a list or tuple of numbers from 0, each once.

    Example:
        >>> stage_numbers([0, 2])
        (0, 2)
    """
    listed = isinstance(stages, (tuple, list))
    whole = listed and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in stages)
    if not whole or len(set(stages)) != len(stages):
        raise ValueError(f"stages must be numbers from 0, each once, or none; not {stages!r}")
    return tuple(stages)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence ``KL(softmax(p) || softmax(q))`` over all positions.

    Args:
        p: teacher [B, C, ...], in front of the softmax over C.
        q: student, likewise.

    Returns:
        A scalar: the sum over C, averaged over B and every position. (``batchmean`` of torch
        would multiply it by the number of positions.)

    Example:
        >>> import torch
        >>> p = torch.tensor([0.75, 0.25]).log().view(1, 2, 1, 1)
        >>> q = torch.tensor([0.5, 0.5]).log().view(1, 2, 1, 1)
        >>> round(float(divergence(p, q)), 4)  # 0.75 log 1.5 + 0.25 log 0.5
        0.1308
    """
    log_p, log_q = F.log_softmax(p, 1), F.log_softmax(q, 1)
    total = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return total * p.shape[1] / p.numel()


def _pooled(h: Tensor, dim: int) -> Tensor:
    """Mean over all positions: [B, C]."""
    return h.movedim(dim, 1).flatten(2).mean(2) if h.dim() > 2 else h


OBJECTIVES: dict[str, type[CrossEntropy | Joint]] = {
    "cross_entropy": CrossEntropy,
    "joint": Joint,
    "specialize": Specialization,
}


def make_objective(name: str, options: Mapping[str, Any], smoothing: float = 0.0) -> CrossEntropy | Joint:
    """The objective that a recipe names.

    Raises:
        ValueError: no objective of this name; an option that it does not have, or whose value
            is wrong.

    Example:
        >>> make_objective("specialize", {"alpha": 0.7, "stages": [2, 3]}).stages
        (2, 3)
    """
    if name not in OBJECTIVES:
        raise ValueError(f"no objective {name!r}; there are {', '.join(OBJECTIVES)}")
    known = [f.name for f in fields(OBJECTIVES[name]) if f.name != "smoothing"]
    for option in options:
        if option not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"objective {name!r} has no option {option!r}; {has}")
    return OBJECTIVES[name](**options, smoothing=smoothing)
