"""How much of each expert the images of a data set get in a CondConv network.

Section 5 of *CondConv* (arXiv 1904.04971): routing weights by layer, class and example.
`routing_weights` collects them in one pass; `research.analysis.expert_plots` draws them.

Shapes::

    N  images   weights   [N, E]        of one layer, float32
    E  experts  labels    [N]           classes, int64
    C  classes  examples  [N]           numbers of the images in the data, int64
                mean, std [C, E]        by class, float64
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pliant._files import atomic_path
from pliant.methods.condconv import CondConvBlock
from pliant.methods.condconv.layers import CondConv2d, CondLinear, SharedRouting
from research.analysis._passes import Hook, labelled, watched

ARRAY = "weights/"  # in a file, before the layer's name


class ClassWeight(NamedTuple):
    """A class and its mean routing weight for one expert."""

    name: str
    mean: float
    label: int


@dataclass(frozen=True)
class ExpertRow:
    """What one class gets of one expert of one layer.

    Attributes:
        layer: path of the layer.
        expert: number, from 0.
        name: of the class.
        images: of the class.
        mean: their mean weight.
        std: standard deviation of their weights.
        best_example: number, in the data, of the image with the highest weight.
        best_weight: that weight.
        best_image: name of the image, where it is known.
    """

    layer: str
    expert: int
    name: str
    images: int
    mean: float
    std: float
    best_example: int
    best_weight: float
    best_image: str = ""


@dataclass(frozen=True, eq=False)
class RoutingWeights:
    """Routing weights of many images in every layer.

    Attributes:
        classes: names, in the order of the labels.
        labels: [N] class of each image.
        examples: [N] number of each image in the data, from 0.
        weights: path of each block or layer, in the order in which they run, to [N, E].
        shared: path of each layer that has no router of its own, to that of the layer
            whose routing it gets; `weights` holds the same tensor for both.

    Raises:
        ValueError: shapes that do not fit together.

    Example:
        >>> found = RoutingWeights(
        ...     classes=("cat", "dog"),
        ...     labels=torch.tensor([0, 1, 1]),
        ...     examples=torch.arange(3),
        ...     weights={"fc": torch.tensor([[1.0, 0.0], [0.25, 0.0], [0.75, 0.0]])},
        ... )
        >>> found.mean("fc")[:, 0].tolist(), found.std("fc")[:, 0].tolist()
        ([1.0, 0.5], [0.0, 0.25])
        >>> found.top_classes("fc", expert=0, n=1)
        [ClassWeight(name='cat', mean=1.0, label=0)]
        >>> found.best_example("fc", expert=0, name="dog"), found.idle("fc")
        (2, [1])
    """

    classes: tuple[str, ...]
    labels: Tensor
    examples: Tensor
    weights: dict[str, Tensor]
    shared: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.labels)
        odd = [layer for layer, w in self.weights.items() if w.dim() != 2 or len(w) != n]
        if odd or len(self.examples) != n or not n or not self.weights:
            raise ValueError(
                f"weights of [N, experts] must come with N labels and N example numbers, at least one; "
                f"not {n} labels, {len(self.examples)} numbers and weights of "
                f"{[tuple(w.shape) for w in self.weights.values()]}"
            )
        if not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            raise ValueError(f"a label has no name: {len(self.classes)} classes were given")

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of the layers, in the order in which they run."""
        return tuple(self.weights)

    def experts(self, layer: str) -> int:
        """E of a layer."""
        return self._of(layer).shape[1]

    def counts(self) -> Tensor:
        """[C] images of each class."""
        return self.labels.bincount(minlength=len(self.classes))

    def mean(self, layer: str) -> Tensor:
        """[C, E] mean weight by class (figure 4); NaN for a class without an image.

        Raises:
            ValueError: there is no such layer; so in all methods that take one.
        """
        weights = self._of(layer).double()
        sums = weights.new_zeros(len(self.classes), weights.shape[1]).index_add_(0, self.labels, weights)
        return sums / self.counts()[:, None]

    def std(self, layer: str) -> Tensor:
        """[C, E] standard deviation within each class (figure 5); NaN as for `mean`.

        It is that of the images at hand: the mean square is over N, not N - 1.
        """
        mean = self.mean(layer)
        squares = (self._of(layer).double() - mean[self.labels]).square()
        return (torch.zeros_like(mean).index_add_(0, self.labels, squares) / self.counts()[:, None]).sqrt()

    def overall(self, layer: str) -> Tensor:
        """[E] mean weight over all images."""
        return self._of(layer).double().mean(0)

    def top_classes(self, layer: str, expert: int, n: int = 10) -> list[ClassWeight]:
        """The `n` classes with the highest mean weight, highest first (figure 6).

        Classes without an image are not among them; so there may be fewer.

        Raises:
            ValueError: there is no such layer or expert.
        """
        mean = self.mean(layer)[:, self._expert(layer, expert)]
        order = mean.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)
        best = [int(label) for label in order[:n] if not mean[label].isnan()]
        return [ClassWeight(self.classes[label], float(mean[label]), label) for label in best]

    def best_example(self, layer: str, expert: int, name: str | int) -> int:
        """Number, in the data, of a class's image with the highest weight (figure 6).

        Args:
            layer: path of the layer.
            expert: number, from 0.
            name: of the class, or its label.

        Raises:
            ValueError: there is no such layer, expert or class, or no image of the class.
        """
        members = (self.labels == self.label(name)).nonzero().flatten()
        weights = self._of(layer)[members, self._expert(layer, expert)]
        return int(self.examples[members[weights.argmax()]])

    def histogram(self, layer: str, bins: int = 50) -> tuple[Tensor, Tensor]:
        """How often weights of each size occur, over all images and experts (figure 7).

        Returns:
            Counts, int64 [bins], and the edges of the bins [bins + 1]: equal steps from 0
            to 1, or to the largest weight beyond (of a router that you wrote).

        Raises:
            ValueError: there is no such layer, or not at least one bin.
        """
        if bins < 1:
            raise ValueError(f"bins must be at least 1, not {bins!r}")
        weights = self._of(layer).numpy()
        span = (min(0.0, float(weights.min())), max(1.0, float(weights.max())))
        counts, edges = np.histogram(weights, bins, span)
        return torch.from_numpy(counts), torch.from_numpy(edges)

    def idle(self, layer: str, threshold: float = 0.0) -> list[int]:
        """Experts of which no image gets more than `threshold`.

        With hard routing (``active``), those that were never chosen: on such data they
        get no gradient. Soft weights are never exactly zero; take 0.01, say.
        """
        return (self._of(layer).amax(0) <= threshold).nonzero().flatten().tolist()

    def rows(self) -> list[ExpertRow]:
        """A row for each layer with a router of its own, class with images, and expert."""
        members = [(self.labels == label).nonzero().flatten() for label in range(len(self.classes))]
        rows = []
        for layer in (layer for layer in self.layers if layer not in self.shared):
            mean, std = self.mean(layer), self.std(layer)
            for label, of in enumerate(members):
                if not len(of):
                    continue
                highest, place = self.weights[layer][of].max(0)
                best = self.examples[of[place]]
                each = (x.tolist() for x in (mean[label], std[label], best, highest))
                for expert, values in enumerate(zip(*each, strict=True)):
                    rows.append(ExpertRow(layer, expert, self.classes[label], len(of), *values))
        return rows

    def label(self, name: str | int) -> int:
        """The label of a class that has images, by its name or label.

        Raises:
            ValueError: there is none, or the name is that of several.
        """
        if isinstance(name, str):
            found = [label for label, known in enumerate(self.classes) if known == name]
        else:
            found = [name] if 0 <= name < len(self.classes) else []
        if len(found) > 1:
            raise ValueError(f"{name!r} is the name of several classes; take a label of {found}")
        if not found:
            few = ", ".join(self.classes[:10]) + ", ..." * (len(self.classes) > 10)
            raise ValueError(f"no class {name!r}; the {len(self.classes)} classes are {few}")
        if not (self.labels == found[0]).any():
            raise ValueError(f"no image of class {name!r} was seen")
        return found[0]

    def save(self, path: str | Path) -> Path:
        """Write everything to one ``.npz`` file (`numpy.load` reads it; no pickle).

        It holds ``classes`` (text), ``labels``, ``examples``, ``layers`` and ``sources``
        (text: for each layer, the one whose router it has, itself or another), and the
        array ``weights/LAYER`` [N, E] for each layer with a router of its own.

        Raises:
            ValueError: the suffix is another.
        """
        path = Path(path)
        if path.suffix != ".npz":
            raise ValueError(f"{path.name}: the suffix must be .npz")
        arrays: dict[str, Any] = {
            ARRAY + layer: w.numpy() for layer, w in self.weights.items() if layer not in self.shared
        }
        arrays |= {
            "classes": np.array(self.classes),
            "labels": self.labels.numpy(),
            "examples": self.examples.numpy(),
            "layers": np.array(self.layers),
            "sources": np.array([self.shared.get(layer, layer) for layer in self.layers]),
        }
        with atomic_path(path) as temporary:
            np.savez(temporary, **arrays)
        return path

    @classmethod
    def load(cls, path: str | Path) -> RoutingWeights:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is another file, or damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                layers, sources = file["layers"].tolist(), file["sources"].tolist()
                own = {name: torch.from_numpy(file[ARRAY + name]) for name in dict.fromkeys(sources)}
                return cls(
                    classes=tuple(file["classes"].tolist()),
                    labels=torch.from_numpy(file["labels"]),
                    examples=torch.from_numpy(file["examples"]),
                    weights={layer: own[s] for layer, s in zip(layers, sources, strict=True)},
                    shared={layer: s for layer, s in zip(layers, sources, strict=True) if layer != s},
                )
        except (AttributeError, KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is no whole file of routing weights: {error}") from error

    def _of(self, layer: str) -> Tensor:
        if layer not in self.weights:
            raise ValueError(f"no layer {layer!r}; there are {', '.join(self.layers)}")
        return self.weights[layer]

    def _expert(self, layer: str, expert: int) -> int:
        if not 0 <= expert < self.experts(layer):
            raise ValueError(f"no expert {expert!r}; {layer} has 0 to {self.experts(layer) - 1}")
        return expert


@torch.no_grad()
def routing_weights(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    classes: Sequence[str],
    *,
    per_class: int | None = None,
) -> RoutingWeights:
    """Collect the routing weights of every CondConv layer for every image.

    The network runs in evaluation mode, on its device; afterwards it is as it was. What
    is kept is float32 on the CPU: 4 N E bytes for each router. With ``per_channel`` an
    expert's weights for the channels of a block are averaged.

    Args:
        model: a network with CondConv layers.
        batches: pairs of images [B, channels, H, W], normalised as the network wants,
            and labels [B], whole numbers.
        classes: names, one for each label.
        per_class: at most so many images of a class, the first ones; None takes all.

    Returns:
        Weights by path of the block (or of the layer, outside of blocks), in the order in
        which they ran. Layers that did not run, of blocks that were skipped, are missing.

    Raises:
        ValueError: the network has no router, or none ran; a label has no name; there are
            no images; a router ran more than once for an image, or gives weights that are not
            finite.

    Example:
        >>> import timm, pliant
        >>> model = timm.create_model("cc_mobilenetv1_025_cifar", experts=4)
        >>> data = [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 1, 0]))]
        >>> found = routing_weights(model, data, ["cat", "dog"])
        >>> found.layers[-1], found.mean("classifier").shape
        ('classifier', torch.Size([2, 4]))
    """
    model = getattr(model, "_orig_mod", model)  # a compiled network does not see new hooks
    routers = routers_of(model)
    if not routers:
        raise ValueError(
            f"{type(model).__name__} has no CondConv layer with a router; convert it with CondConv, or "
            f"take a network such as cc_resnet20_cifar"
        )
    given: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    kept: dict[str, list[Tensor]] = {}

    def remember(layer: str) -> Hook:
        def hook(router: nn.Module, _args: Any, routing: Tensor) -> None:
            if layer in given:
                raise ValueError(f"the router of {layer} ran more than once for the same images")
            if isinstance(router, SharedRouting):  # which hands on the very tensor it got
                source = next((name for name, other in given.items() if other is routing), None)
                if source is not None:
                    shared[layer] = source
            given[layer] = routing

        return hook

    labels: list[Tensor] = []
    examples: list[Tensor] = []
    like = next(model.parameters())
    with watched(model, ((router, remember(layer)) for layer, router in routers.items())):
        for images, their_labels, numbers in labelled(batches, len(classes), per_class):
            given.clear()
            model(images.to(like.device, like.dtype))
            for layer, routing in given.items():
                of = kept.setdefault(layer, [])  # also says that a shared layer ran
                if layer not in shared:
                    mean = routing if routing.dim() == 2 else routing.mean(2)
                    if not mean.isfinite().all():
                        raise ValueError(f"the router of {layer} gives weights that are not finite")
                    of.append(mean.to("cpu", torch.float32))
            labels.append(their_labels)
            examples.append(numbers)
    if not labels:
        raise ValueError("there are no images, so nothing to collect")
    if not kept:
        raise ValueError(f"none of the {len(routers)} routers of {type(model).__name__} ran")
    own = {layer: torch.cat(parts) for layer, parts in kept.items() if layer not in shared}
    return RoutingWeights(
        classes=tuple(classes),
        labels=torch.cat(labels),
        examples=torch.cat(examples),
        weights={layer: own[shared.get(layer, layer)] for layer in kept},
        shared=shared,
    )


def routers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The routers of a network by the path of their block or layer, shared ones included.

    Example:
        >>> import timm, pliant
        >>> found = routers_of(timm.create_model("cc_resnet20_cifar", begin=9, routing="single"))
        >>> [(layer, type(router).__name__) for layer, router in found.items()]
        [('layer3.1', 'Router'), ('layer3.2', 'SharedRouting'), ('fc', 'SharedRouting')]
    """
    conditional = (CondConvBlock, CondConv2d, CondLinear)
    return {
        path: module.router
        for path, module in model.named_modules()
        if isinstance(module, conditional) and module.router is not None
    }
