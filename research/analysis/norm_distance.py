"""How far apart the two means of each switchable norm are, and figure 3(b), drawn.

Section 4.4 of *Adaptive Depth Networks* (arXiv 2312.16392): the first norm of a stage should
have close means in the whole network and in the base network, because the stages before it
give the same distribution at either depth; the norms behind it need not.

Shapes in this file::

    C  channels of a norm   mean  [C]  float64, over images and positions
    L  norms                x     what a norm gets: [B, C, ...], or [B, ..., C]
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm import layers
from torch import Tensor, nn

from pliant.figures import check_suffix, plain, write_figure
from pliant.methods.adaptive_depth import AdaptiveBlock, SwitchableNorm
from pliant.methods.adaptive_depth.depth import at_depth
from pliant.methods.adaptive_depth.switch import find_depth
from research.analysis._passes import Hook, watched

# Okabe and Ito's, told apart by the colour-blind too: one for each stage.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

# Norms that get their channels last, but for those of layer norms that get [B, C, H, W].
_LAST = (
    nn.LayerNorm,
    nn.RMSNorm,
    layers.RmsNorm,
    layers.RmsNormFp32,
    layers.SimpleNorm,
    layers.SimpleNormFp32,
)
_LAYER_NORMS_2D = (
    layers.LayerNorm2d,
    layers.LayerNorm2dFp32,
    layers.LayerNormAct2d,
    layers.LayerNormAct2dFp32,
)


@dataclass(frozen=True, eq=False)
class NormDistances:
    """The two means of every switchable norm.

    Attributes:
        full: path of each norm, in the order of the network, to the mean [C] of what it
            gets where its stage runs whole.
        base: the same where its stage skips.
        stages: path of each norm to the number of its stage's flag, as `pliant.set_depth`
            counts.
        images: how many the means are of; None: they are running means.

    Example:
        >>> found = NormDistances(
        ...     full={"layer1.0.bn1": torch.tensor([1.0, 0.0]), "layer1.0.bn2": torch.zeros(2)},
        ...     base={"layer1.0.bn1": torch.tensor([1.0, 0.0]), "layer1.0.bn2": torch.tensor([3.0, 4.0])},
        ...     stages={"layer1.0.bn1": 0, "layer1.0.bn2": 0},
        ... )
        >>> found.distances().tolist(), found.first
        ([0.0, 5.0], ('layer1.0.bn1',))
    """

    full: dict[str, Tensor]
    base: dict[str, Tensor]
    stages: dict[str, int]
    images: int | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of the norms, in the order of the network."""
        return tuple(self.full)

    @property
    def first(self) -> tuple[str, ...]:
        """The first norm of each stage, of which the paper says that its distance is close to zero."""
        found: dict[int, str] = {}
        for layer, stage in self.stages.items():
            found.setdefault(stage, layer)
        return tuple(found.values())

    def distances(self, *, per_channel: bool = False) -> Tensor:
        """[L] Euclidean distance of each norm's two means, float64.

        The paper does not say which distance it drew.

        Args:
            per_channel: divided by the square root of C (the root mean square over
                channels), which compares norms of different widths.
        """
        found = torch.stack(
            [(self.full[layer] - self.base[layer]).double().norm() for layer in self.layers]
        )
        widths = torch.tensor([self.full[layer].numel() for layer in self.layers])
        return found / widths.sqrt() if per_channel else found


@torch.no_grad()
def norm_distances(
    model: nn.Module, batches: Iterable[Tensor | tuple[Tensor, ...] | list[Tensor]] | None = None
) -> NormDistances:
    """The two means of every switchable norm of an adaptive network.

    Without images they are the running means of batch norms, as in the paper. Layer and group
    norms keep none, and their weights and biases say nothing about their inputs, which the
    paper's argument is about; so these need images: what each norm gets in the whole network
    is averaged, and what it gets in the base network. With images this is done for batch
    norms too, in evaluation mode.

    Args:
        model: a network converted by `AdaptiveDepth`; it is left as it was.
        batches: images [B, channels, H, W], normalised as the network wants, or tuples whose
            first part they are, as of a data loader. None: running means.

    Raises:
        ValueError: the network has no adaptive depth or no switchable norm, or a norm keeps
            no running mean and there are no images; or no image reached a norm.

    Example:
        >>> import timm, pliant
        >>> model = timm.create_model("resnet20_cifar_adn")
        >>> found = norm_distances(model)
        >>> found.layers[:3]
        ('layer1.0.bn1', 'layer1.0.bn2', 'layer1.1.bn1')
        >>> found.distances().sum().item()  # the second norms start as copies
        0.0
        >>> norm_distances(model, [torch.randn(4, 3, 32, 32)]).full["layer1.0.bn1"].shape
        torch.Size([16])
    """
    model = getattr(model, "_orig_mod", model)  # a compiled network does not see new hooks
    flags = len(find_depth(model).skip)
    norms, stages = _switchable(model)
    if not norms:
        raise ValueError(
            f"this {type(model).__name__} has no switchable norm: it was converted with "
            f"switchable_norms=False, so there is one mean for both depths"
        )
    if batches is not None:
        full, base, images = _measured(model, norms, batches, flags)
        return NormDistances(full, base, stages, images)
    for path, pair in norms.items():
        if any(getattr(norm, "running_mean", None) is None for norm in (pair.full, pair.base)):
            raise ValueError(
                f"{path} is a {type(pair.full).__name__} without a running mean; give images to average "
                f"over: norm_distances(model, batches)"
            )
    full, base = (
        {path: getattr(pair, side).running_mean.double().cpu() for path, pair in norms.items()}
        for side in ("full", "base")
    )
    return NormDistances(full, base, stages)


def _switchable(model: nn.Module) -> tuple[dict[str, SwitchableNorm], dict[str, int]]:
    """The switchable norms, by the path that they have in the plain network, and their flags."""
    norms: dict[str, SwitchableNorm] = {}
    stages: dict[str, int] = {}
    for where, block in model.named_modules():
        if not isinstance(block, AdaptiveBlock):
            continue
        for inner, module in block.block.named_modules():
            if isinstance(module, SwitchableNorm):
                path = f"{where}.{inner}"
                norms[path], stages[path] = module, block.flag
    return norms, stages


class _Mean:
    """A running sum over everything but the channels."""

    def __init__(self) -> None:
        self.sum: Tensor | float = 0.0
        self.count = 0

    def add(self, norm: nn.Module, x: Tensor) -> None:
        last = isinstance(norm, _LAST) and not isinstance(norm, _LAYER_NORMS_2D)
        x = x.movedim(-1 if last else 1, -1).flatten(0, -2)
        self.sum = self.sum + x.sum(0, dtype=torch.float64)
        self.count += len(x)


def _measured(
    model: nn.Module,
    norms: dict[str, SwitchableNorm],
    batches: Iterable[Tensor | tuple[Tensor, ...] | list[Tensor]],
    flags: int,
) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    sides = ("full", "base")
    means = {side: {path: _Mean() for path in norms} for side in sides}
    images = 0

    def average(mean: _Mean) -> Hook:
        def hook(norm: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
            mean.add(norm, args[0])

        return hook

    hooks = [(getattr(pair, side), average(means[side][p])) for p, pair in norms.items() for side in sides]
    like = next(model.parameters())
    with watched(model, hooks):
        for batch in batches:
            x = (batch if isinstance(batch, Tensor) else batch[0]).to(like.device, like.dtype)
            images += len(x)
            for skip in (False, True):
                with at_depth(model, (skip,) * flags):
                    model(x)
    empty = [path for path in norms if not all(means[side][path].count for side in sides)]
    if empty:
        why = f"{images} images reached no {empty[0]}" if images else "there are no images to average over"
        raise ValueError(why)
    full, base = (
        {path: torch.as_tensor(mean.sum / mean.count).cpu() for path, mean in means[side].items()}
        for side in sides
    )
    return full, base, images


def plot_norm_distances(found: NormDistances, path: str | Path, *, per_channel: bool = False) -> Path:
    """Draw the distance of each norm's two means, a colour for each stage (figure 3(b)).

    The first norm of each stage is hatched: its bar says whether the stages before it give
    features of the same mean at either depth.

    Args:
        found: from `norm_distances`.
        path: where the figure goes, as SVG, PNG or PDF by its suffix.
        per_channel: as of `NormDistances.distances`.

    Returns:
        `path`.

    Raises:
        ValueError: an unknown suffix, or nothing to draw.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    path = check_suffix(path)
    if not found.layers:
        raise ValueError("no norms to draw; norm_distances gives them")
    distances = found.distances(per_channel=per_channel).tolist()
    figure = Figure(figsize=(max(6.0, 1.5 + 0.24 * len(distances)), 4.2), layout="constrained")
    axes = figure.subplots()
    stages = list(dict.fromkeys(found.stages.values()))
    colours = {stage: COLOURS[n % len(COLOURS)] for n, stage in enumerate(stages)}
    firsts = set(found.first)
    for n, (layer, distance) in enumerate(zip(found.layers, distances, strict=True)):
        axes.bar(
            n,
            distance,
            width=0.8,
            color=colours[found.stages[layer]],
            edgecolor="white",
            hatch="////" if layer in firsts else None,
            zorder=2,
        )
    axes.set_xticks(range(len(distances)), found.layers, rotation=90, fontsize=7)
    axes.set_xlim(-0.7, len(distances) - 0.3)
    axes.set_ylim(bottom=0)
    of = "running means" if found.images is None else f"means of what {found.images:,} images give"
    axes.set_title(f"switchable norms, whole against base network: {of}", fontsize=10, loc="left")
    axes.set_ylabel("distance of means" + (", per channel" if per_channel else ""))
    handles = [Patch(color=colours[stage], label=f"stage {stage}") for stage in stages]
    handles.append(Patch(facecolor="#999999", edgecolor="white", hatch="////", label="first of its stage"))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False
    )
    plain(axes)
    axes.grid(visible=False, axis="x")
    return write_figure(figure, path)
