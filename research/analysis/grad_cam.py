"""Grad-CAM by block: where in an image each block finds what speaks for a class.

Selvaraju et al., *Grad-CAM*, ICCV 2017, as figure 4 of *Adaptive Depth Networks* (arXiv
2312.16392) uses it: for the blocks of a stage, in the plain network, the whole adaptive
network (super-net) and the base network. `grad_cam` computes, `plot_grad_cam` draws.

Shapes in this file::

    B  images                feature map  [B, C, H, W]  output of a block
    S  pixels of an image    map          [B, H, W]     float32 from 0 to 1
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from pliant import anatomy
from pliant._config import some
from pliant.figures import check_suffix, write_figure
from pliant.methods.adaptive_depth.depth import at_depth
from research.analysis._passes import Hook, watched

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

INCHES = 1.15  # of a panel


def grad_cam(
    model: nn.Module,
    images: Tensor,
    targets: Tensor | Sequence[int],
    blocks: Sequence[str] | None = None,
    *,
    skip: Sequence[bool] | None = None,
) -> dict[str, Tensor]:
    """Class activation maps of each block for a class of each image.

    The channels of a block's output are added up, each weighted by the mean gradient of the
    class's score (before the softmax) by that channel; what is negative is set to 0, and
    each map is divided by its largest value. So maps show where, and not how much: a map's 1
    is not another's. The network runs in evaluation mode, and afterwards it is as it was,
    gradients included.

    Args:
        model: a convolutional network, plain or converted.
        images: [B, channels, S, S], normalised as the network wants.
        targets: [B] the class of each image that the maps are for.
        blocks: paths of blocks, or of any modules that give feature maps; None: all blocks.
        skip: the depth of an adaptive network, a flag for each stage that can skip; None:
            the one that it has.

    Returns:
        A map [B, H, W] on the CPU for each block's path, in the order in which they ran. A
        block that is skipped gives no map and is missing. A map in which nothing speaks for the class
        is 0 everywhere.

    Raises:
        ValueError: a block of a transformer, which gives tokens; no such block, or one that
            did not run, ran twice, or gives no feature map; targets that are no classes; a
            depth for a network that has none.

    Example:
        >>> import timm, torch, pliant
        >>> model = timm.create_model("resnet20_cifar_adn")
        >>> x, y = torch.randn(2, 3, 32, 32), [3, 5]
        >>> {path: tuple(m.shape) for path, m in grad_cam(model, x, y).items() if "layer3" in path}
        {'layer3.0': (2, 8, 8), 'layer3.1': (2, 8, 8), 'layer3.2': (2, 8, 8)}
        >>> base = grad_cam(model, x, y, skip=(True, True, True))
        >>> [path for path in base if "layer3" in path]
        ['layer3.0', 'layer3.1']
    """
    model = getattr(model, "_orig_mod", model)  # a compiled network does not see new hooks
    known = {b.path: b.module for stage in anatomy.stages(model) for b in stage.blocks}
    wanted = _modules(model, known, blocks)
    classes = _classes(images, targets)
    seen: dict[str, tuple[Tensor, bool]] = {}
    done = False

    def remember(path: str) -> Hook:
        def hook(_module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
            if done:  # gradient checkpointing runs the block again
                return
            if path in seen:
                raise ValueError(f"{path} ran twice for the same images, so it has no one map")
            skipped = path in known and bool(args) and y is args[0]
            if path in wanted and not skipped:
                _check_map(path, y)
            seen[path] = y, skipped

        return hook

    like = next(model.parameters())
    hooks = [(module, remember(path)) for path, module in {**known, **wanted}.items()]
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        watched(model, hooks),
        nullcontext() if skip is None else at_depth(model, skip),
    ):
        # They ask for gradients, so that there are some in a frozen network too.
        x = images.detach().to(like.device, like.dtype, copy=True).requires_grad_()
        scores = model(x)
        done = True
        if not isinstance(scores, Tensor) or scores.dim() != 2:
            raise ValueError(f"{type(model).__name__} gives no scores [B, classes], but {_told(scores)}")
        if int(classes.max()) >= scores.shape[1]:
            raise ValueError(
                f"target {int(classes.max())} is none of the {scores.shape[1]} classes, counted from 0"
            )
        maps = {path: y for path, (y, skipped) in seen.items() if path in wanted and not skipped}
        _check_ran(wanted, maps, [path for path, (_, skipped) in seen.items() if skipped])
        chosen = scores.gather(1, classes.to(scores.device)[:, None]).sum()
        gradients = torch.autograd.grad(chosen, list(maps.values()), materialize_grads=True)
    return {
        path: _cam(y.detach().float(), gradient.float()).cpu()
        for (path, y), gradient in zip(maps.items(), gradients, strict=True)
    }


def _modules(
    model: nn.Module, known: Mapping[str, nn.Module], blocks: Sequence[str] | None
) -> dict[str, nn.Module]:
    """The modules whose maps are wanted, by path."""
    if blocks is None:
        if not known:
            raise ValueError(
                f"{type(model).__name__} has no block of a known family; name modules that give feature "
                f"maps: blocks=[...]"
            )
        wanted = dict(known)
    else:
        if isinstance(blocks, str) or not blocks:
            raise ValueError(f"blocks must be a list of paths, or None for all, not {blocks!r}")
        modules = dict(model.named_modules())
        for path in blocks:
            if path not in modules:
                raise ValueError(
                    f"no block {path!r} in this {type(model).__name__}; there are {some(known or modules)}"
                )
        wanted = {path: modules[path] for path in blocks}
    for path, module in wanted.items():
        if anatomy.is_transformer(module):
            raise ValueError(
                f"{path} is a block of a transformer, which gives tokens and no feature map [B, C, H, W]; "
                f"Grad-CAM is for convolutional networks"
            )
    return wanted


def _classes(images: Tensor, targets: Tensor | Sequence[int]) -> Tensor:
    """Targets as int64 [B]."""
    classes = torch.as_tensor(targets)
    if images.dim() != 4 or not len(images):
        raise ValueError(f"images must be [B, channels, S, S], at least one, not {tuple(images.shape)}")
    if classes.shape != images.shape[:1] or classes.is_floating_point() or classes.dtype == torch.bool:
        raise ValueError(
            f"targets must be a class, a whole number, for each of {len(images)} images; not of shape "
            f"{tuple(classes.shape)} and {classes.dtype}"
        )
    if int(classes.min()) < 0:
        raise ValueError(f"targets must be classes from 0, not {int(classes.min())}")
    return classes.long()


def _check_map(path: str, y: Any) -> None:
    if not isinstance(y, Tensor) or y.dim() != 4:
        raise ValueError(f"{path} gives no feature map [B, C, H, W], but {_told(y)}")


def _check_ran(wanted: Mapping[str, nn.Module], maps: Mapping[str, Tensor], skipped: Sequence[str]) -> None:
    for path in wanted:
        if path not in maps and not any(f"{path}.".startswith(f"{block}.") for block in skipped):
            raise ValueError(f"{path} did not run on its own, so it has no map; take the block around it")
    if not maps:
        raise ValueError(f"every block that was asked for is skipped at this depth: {some(wanted)}")


def _told(y: object) -> str:
    return f"a tensor of shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"


def _cam(y: Tensor, gradient: Tensor) -> Tensor:
    """Maps [B, H, W] of feature maps and their gradients, both [B, C, H, W]."""
    weights = gradient.mean((2, 3), keepdim=True)
    cam = (weights * y).sum(1).relu()
    return cam / cam.amax((1, 2), keepdim=True).clamp(min=torch.finfo(cam.dtype).tiny)


def plot_grad_cam(
    maps: Mapping[str, Mapping[str, Tensor]],
    pictures: Sequence[Any],
    path: str | Path,
    *,
    blocks: Sequence[str] | None = None,
) -> Path:
    """Draw the maps of several networks over the images they are for (figure 4).

    A row for each image; a group of columns for each network, and in it one for each of its
    blocks. A block that a network skips has no column there.

    Args:
        maps: a name for each network, in the order of the columns (``"plain"``, ``"super"``,
            ``"base"``), to its maps from `grad_cam`, of the same images.
        pictures: the images, one for each map: from PIL, or arrays [H, W], [H, W, 1] or
            [H, W, 3] of bytes or of numbers from 0 to 1.
        path: where the figure goes, as SVG, PNG or PDF by its suffix.
        blocks: paths; None: those of the third stage, as in the paper, or of the last one of
            networks that have fewer.

    Returns:
        `path`.

    Raises:
        ValueError: nothing to draw; another number of pictures than of maps; a picture that is
            none; a block that no network has; an unknown suffix.
    """
    from matplotlib.figure import Figure

    path = check_suffix(path)
    shown = {network: dict(by_block) for network, by_block in maps.items() if by_block}
    if not shown or not len(pictures):
        raise ValueError(f"nothing to draw: {len(maps)} networks, {len(pictures)} pictures")
    there = dict.fromkeys(block for by_block in shown.values() for block in by_block)
    chosen = _third_stage(list(there)) if blocks is None else list(blocks)
    for block in chosen:
        if block not in there:
            raise ValueError(f"no network has a map of {block!r}; there are {some(there)}")
    groups = {network: [b for b in chosen if b in by_block] for network, by_block in shown.items()}
    groups = {network: own for network, own in groups.items() if own}
    for network, own in groups.items():
        for block in own:
            if (many := len(shown[network][block])) != len(pictures):
                raise ValueError(f"{len(pictures)} pictures for {many} maps of {block} in {network}")
    arrays = [_array(picture) for picture in pictures]
    # A column for each block of each network, and None for a gap before each network.
    columns: list[tuple[str, str] | None] = []
    for network, own in groups.items():
        columns += [None, *((network, block) for block in own)]
    widths = [1.0, *(0.08 if column is None else 1.0 for column in columns)]
    figure = Figure(
        figsize=(0.6 + INCHES * sum(widths), 0.6 + INCHES * len(arrays)),
        layout="constrained",
    )
    panels = figure.subplots(len(arrays), len(widths), width_ratios=widths, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    panels[0, 0].set_title("image", fontsize=8)
    drawn = None
    for n, (line, array) in enumerate(zip(panels, arrays, strict=True)):
        _picture(line[0], array)
        for axes, column in zip(line[1:], columns, strict=True):
            if column is not None:
                network, block = column
                _picture(axes, array)
                drawn = _heat(axes, array, shown[network][block][n])
                if n == 0:
                    axes.set_title(block, fontsize=8)
    for axes, before, column in zip(panels[0, 2:], columns, columns[1:], strict=False):
        if before is None and column is not None:
            axes.annotate(column[0], (0, 1), (0, 18), "axes fraction", "offset points", fontsize=11)
    if drawn is not None:
        figure.colorbar(drawn, ax=panels, fraction=0.02, pad=0.01, ticks=[0, 1])
    return write_figure(figure, path)


def _picture(axes: Axes, array: np.ndarray[Any, Any]) -> None:
    height, width = array.shape[:2]
    limit = 255 if array.dtype == np.uint8 else 1
    axes.imshow(array, cmap="gray", vmin=0, vmax=limit, extent=(0, width, height, 0))


def _heat(axes: Axes, array: np.ndarray[Any, Any], cam: Tensor) -> AxesImage:
    """A map over a picture, whatever the size of either."""
    height, width = array.shape[:2]
    return axes.imshow(
        cam.numpy(),
        cmap="inferno",
        vmin=0,
        vmax=1,
        alpha=0.6,
        interpolation="bilinear",
        extent=(0, width, height, 0),
    )


def _third_stage(blocks: Sequence[str]) -> list[str]:
    """The blocks of the third stage, or of the last: paths that differ in their last part only."""
    stages: dict[str, list[str]] = {}
    for block in blocks:
        stages.setdefault(block.rpartition(".")[0], []).append(block)
    containers = list(stages.values())
    return containers[min(2, len(containers) - 1)]


def _array(picture: Any) -> np.ndarray[Any, Any]:
    array = np.asarray(picture.cpu() if isinstance(picture, Tensor) else picture)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)):
        raise ValueError(f"a picture must be of [H, W] or [H, W, 3], not {array.shape}")
    return array
