"""Learning from a frozen teacher, by its logits and by the outputs of its stages.

- logits: Hinton, Vinyals, Dean, *Distilling the Knowledge in a Neural Network*, arXiv
  1503.02531, section 2: the Kullback-Leibler divergence of both softmaxes at temperature T,
  times T squared, mixed with the cross entropy by labels.
- features: after Romero et al., *FitNets*, arXiv 1412.6550, equation 3, or Zagoruyko and
  Komodakis, *Paying More Attention to Attention*, arXiv 1612.03928, equation 2; see `distance`.

Shapes in this file::

    x       [B, C, S, S] images as the student sees them: augmented and mixed
    logits  [B, classes]
    h       [B, C, H, W], [B, H, W, C] or [B, tokens, C]: the output of a stage
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant import anatomy
from pliant._options import NotNegative, Positive, Probability, check, refuse_unknown
from pliant.evaluating import evaluating
from pliant.objectives import Feature, ManyPasses, Seen, StageNumbers, divergence, stage_outputs

Match = Literal["maps", "attention"]


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """How a student learns from a teacher.

    The loss is ``(1 - alpha) * CE + alpha * T^2 * KL(teacher / T || student / T) + features *
    sum_s distance_s``, with the objective in the place of ``CE``. Of an objective for two depths
    see `Teaching.terms`.

    Args:
        alpha: weight of the teacher's logits, in [0, 1]; labels have the rest.
        temperature: T, by which logits are divided; gradients keep their size by T squared.
        features: weight of the distance between the stages' outputs, summed over stages; 0: off.
        match: what is compared: ``"maps"``, the whole output of a stage, or ``"attention"``, the energy
            at each position, which also fits networks of different widths.
        stages: numbers of the stages to compare (`pliant.anatomy.stages`), from 0; None: all.

    Raises:
        ValueError: an option is out of its range, or nothing is left to learn from.

    Example:
        >>> Distillation(alpha=0.5, temperature=2).temperature
        2.0
    """

    alpha: Probability = 0.9
    temperature: Positive = 4.0
    features: NotNegative = 0.0
    match: Match = "maps"
    stages: StageNumbers | None = None

    def __post_init__(self) -> None:
        check(self)
        if not (self.alpha or self.features):
            raise ValueError(
                "alpha=0 with features=0 leaves nothing to learn from the teacher; set one of them above 0"
            )
        if self.stages is None:
            return
        if not self.stages:
            raise ValueError("stages=() compares no features; give numbers of stages, or none for all")
        if not self.features:
            raise ValueError(f"stages={self.stages} needs features above 0; set features=1")


def make_distillation(options: Mapping[str, Any]) -> Distillation:
    """The `Distillation` of a recipe's ``distill_args``.

    Raises:
        ValueError: an option is unknown, or its value is wrong.
    """
    refuse_unknown(options, [f.name for f in fields(Distillation)], "distill_args")
    return Distillation(**options)


class Teaching:
    """A frozen teacher, and the terms that it adds to a student's loss.

    It is no module, so the student's state, optimiser and average do not contain the teacher; copies
    share it.

    Args:
        teacher: network to freeze and put into evaluation mode, in place.
        rule: how the student learns from it.
        name: name of the teacher.

    Attributes:
        identity: name, and hash of the weights; a run's checkpoints keep both.
    """

    def __init__(self, teacher: nn.Module, rule: Distillation, name: str) -> None:
        self.teacher, self.rule = teacher.eval().requires_grad_(False), rule
        self.identity = {"network": name, "sha256": digest(teacher)}

    def __deepcopy__(self, _memo: dict[int, Any]) -> Teaching:
        return self

    def check(self, student: nn.Module, size: tuple[int, int, int]) -> None:
        """Refuse a teacher that the student cannot learn from. Both are run on an image of zeros.

        Raises:
            ValueError: the classes differ, or the stages to compare are missing or differ in shape.
        """
        x = torch.zeros(1, *size, device=next(student.parameters()).device)
        with evaluating(student), torch.no_grad(), self.watch(student) as seen:
            logits = student(x)
        self.teacher.to(x.device)
        told, features = self._look(x)
        if told.shape != logits.shape:
            raise ValueError(
                f"the teacher {self.identity['network']} gives {told.shape[-1]} classes, the network "
                f"{logits.shape[-1]}; give a teacher for the same classes"
            )
        if features.keys() != seen.keys():
            raise ValueError(
                f"the teacher has {len(features)} stages and the network {len(seen)}; name the stages to "
                f"compare, such as distill_args.stages=(0, 1)"
            )
        for n, (feature,) in seen.items():
            try:
                distance(features[n][0], feature, self.rule.match)
            except ValueError as error:
                raise ValueError(f"stage {n} of the teacher and of the network: {error}") from error

    @contextmanager
    def watch(self, network: nn.Module) -> Iterator[Seen]:
        """Collect the outputs of a network's stages within the block, if features are compared."""
        if not self.rule.features:
            yield {}
            return
        found = anatomy.stages(network)
        if not found:
            raise ValueError(
                f"features of {type(network).__name__} cannot be compared, as its stages are unknown; set "
                f"features=0"
            )
        ends = {
            n: (stage.blocks[-1].module, stage.blocks[-1].out_channels) for n, stage in enumerate(found)
        }
        with stage_outputs(network, ends, self.rule.stages) as seen:
            yield seen

    def terms(
        self, terms: Mapping[str, Tensor], objective: object, outputs: Any, seen: Seen, x: Tensor
    ) -> dict[str, Tensor]:
        """The objective's terms, those by labels weighted down, and the teacher's.

        Of an objective of several passes, each pass that learns from its labels
        (`ManyPasses.taught`) learns from the teacher too, and only the cross entropy of such a
        pass gives way: what binds the other passes to it stays as without a teacher.

        Args:
            terms: the objective's.
            objective: that gave them.
            outputs: of the student: logits, or what `ManyPasses.run` gave.
            seen: outputs of its stages, of each pass.
            x: its images.

        Returns:
            Also ``distill_logits`` and ``distill_stage0`` and so on, with the pass's
            ending behind the name; scalars in float32, weighted.
        """
        if isinstance(objective, ManyPasses):
            weights, students = objective.taught, objective.pass_logits(outputs)
            by_labels = {f"cross_entropy{suffix}" for suffix in weights}
        else:
            weights, students, by_labels = {"": 1.0}, (outputs,), set(terms)
        rule = self.rule
        result = {k: (1 - rule.alpha) * t if k in by_labels else t for k, t in terms.items()}
        logits, features = self._look(x)
        for number, (suffix, weight) in enumerate(weights.items()):
            if rule.alpha:
                term = soft_divergence(logits, students[number], rule.temperature)
                result[f"distill_logits{suffix}"] = weight * rule.alpha * term
            for n, (target,) in features.items():
                apart = distance(target, seen[n][number], rule.match)
                result[f"distill_stage{n}{suffix}"] = weight * rule.features * apart
        return result

    def to(self, device: torch.device, *, channels_last: bool = False) -> None:
        """Move the teacher to the student's device and memory format."""
        self.teacher.to(device)
        if channels_last:
            self.teacher.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def _look(self, x: Tensor) -> tuple[Tensor, Seen]:
        """The teacher's logits and stage outputs for `x`."""
        with self.watch(self.teacher) as seen:
            logits: Tensor = self.teacher(x)
        return logits, seen


def soft_divergence(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """``T^2 * KL(softmax(teacher / T) || softmax(student / T))``, averaged over the batch.

    Args:
        teacher: logits [B, classes].
        student: logits [B, classes].
        temperature: T.

    Example:
        >>> teacher, student = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
        >>> round(float(soft_divergence(2 * teacher, 2 * student, 2.0)), 4)  # 4 times 0.1308
        0.5232
    """
    return temperature**2 * divergence(teacher.float() / temperature, student.float() / temperature)


def distance(teacher: Feature, student: Feature, match: Match = "maps") -> Tensor:
    """Half the squared distance of two feature maps of length 1, averaged over the batch.

    This is one minus the cosine of their angle: 0 for equal directions, at most 2. It is FitNets'
    equation 3 without the regressor, on maps of length 1 as in Attention Transfer, so that no stage
    outweighs another. With ``match="attention"`` the maps are those of Attention Transfer: the mean of
    ``h ** 2`` over the channels (its equation 2 with p = 2, squared).

    Raises:
        ValueError: the shapes differ; with ``"attention"`` the channels may.

    Example:
        >>> a, b = torch.tensor([[[[3.0]], [[4.0]]]]), torch.tensor([[[[4.0]], [[3.0]]]])
        >>> round(float(distance(Feature(a, 1), Feature(b, 1))), 4)  # 1 - 24 / 25
        0.04
    """
    one, two = (f.h.float().movedim(f.dim, 1) for f in (teacher, student))
    if match == "attention":
        one, two = (h.square().mean(1, keepdim=True) for h in (one, two))
    if one.shape != two.shape:
        hint = "" if match == "attention" else "; match=attention compares maps of different widths"
        raise ValueError(
            f"outputs of shape {_shape(teacher)} and {_shape(student)} (channels first) cannot be compared"
            f"{hint}"
        )
    one, two = (F.normalize(h.flatten(1), dim=1) for h in (one, two))
    return (one - two).square().sum(1).mean() / 2


def digest(network: nn.Module) -> str:
    """A hash of a network's state: names, types, shapes and bits of all entries.

    Example:
        >>> one, two = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> digest(one) == digest(two), digest(one) == digest(one.requires_grad_(False))
        (False, True)
    """
    found = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if isinstance(value, Tensor):
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            bits = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            found.update(bits.numpy().tobytes())
        else:  # extra state of a module
            found.update(f"{name} {value!r}".encode())
    return found.hexdigest()


def _shape(feature: Feature) -> tuple[int, ...]:
    return tuple(feature.h.movedim(feature.dim, 1).shape[1:])
