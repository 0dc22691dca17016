"""What an exported file takes: preparation that goes into the graph, and images to check it with.

Shapes in this file::

    B  batch       images  [B, C, H, W] as the file takes them: float32, or uint8
    C  channels    x       [B, C, H', W'] as the network takes them: normalised
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from pliant.image_files import SUFFIXES, decoded

Takes = Literal["normalised", "float", "uint8"]
Size = tuple[int, int, int]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Preparation:
    """How images become what the network takes.

    Attributes:
        takes: ``"normalised"``: images as training gives them, ``(image - mean) / std`` of values
            in [0, 1]; ``"float"``: values in [0, 1]; ``"uint8"``: whole numbers, 0 to 255.
        size: channels, height and width of the images.
        network_size: those that the network sees; others are resized (bilinear, without
            antialiasing).
        mean: mean of each channel, subtracted.
        std: standard deviation of each channel, by which the difference is divided.

    Raises:
        ValueError: one does not fit another.
    """

    takes: Takes
    size: Size
    network_size: Size
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.takes not in get_args(Takes):
            raise ValueError(f"takes must be one of {', '.join(get_args(Takes))}; not {self.takes!r}")
        for name, size in (("size", self.size), ("network_size", self.network_size)):
            whole = all(isinstance(n, int) and n > 0 for n in size)
            if len(size) != 3 or not whole:
                raise ValueError(f"{name} must be channels, height and width, not {size!r}")
        if self.size[0] != self.network_size[0]:
            raise ValueError(
                f"images of {self.size[0]} channels do not fit a network of {self.network_size[0]}"
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) not in (1, self.size[0]):
                raise ValueError(f"{name} has {len(values)} values, and images {self.size[0]} channels")
        if self.takes != "normalised" and (self.mean is None or self.std is None):
            raise ValueError(
                f"takes={self.takes!r} needs the normalisation, which this network does not state; pass "
                f"mean and std"
            )
        if self.std is not None and not all(value > 0 for value in self.std):
            raise ValueError(f"std must be above 0, not {self.std}")

    def random(self, count: int, generator: torch.Generator) -> Tensor:
        """Random images [count, C, H, W], as the file takes them."""
        shape = (count, *self.size)
        if self.takes == "uint8":
            return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        if self.takes == "float":
            return torch.rand(shape, generator=generator)
        return torch.randn(shape, generator=generator)

    def real(self, count: int, folder: Path | None) -> Tensor:
        """Real images [count, C, H, W], as the file takes them.

        Args:
            count: how many; where there are fewer, they are repeated.
            folder: of image files, of which some all over the folder are read; None: scikit-learn's digits.

        Raises:
            ValueError: the folder holds no image, or a damaged one.
        """
        images = _digits(count, self.size) if folder is None else _read(folder, count, self.size)
        return self.taken(images.repeat(-(-count // len(images)), 1, 1, 1)[:count])

    def taken(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] of values in [0, 1], as the file takes them."""
        if self.takes == "uint8":
            return (images * 255).round().to(torch.uint8)
        if self.takes == "float" or self.mean is None or self.std is None:
            return images
        return (images - _channels(self.mean)) / _channels(self.std)


class Prepared(nn.Module):
    """A network behind the preparation of its images.

    Args:
        network: takes images [B, C, H', W'] of `dtype`.
        preparation: what is done to them before.
        dtype: that the network computes in; images and outputs are float32.

    Example:
        >>> baked = Preparation("uint8", (1, 4, 4), (1, 2, 2), (0.5,), (0.25,))
        >>> Prepared(nn.Identity(), baked)(torch.full((1, 1, 4, 4), 255, dtype=torch.uint8))
        tensor([[[[2., 2.],
                  [2., 2.]]]])
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, network: nn.Module, preparation: Preparation, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype
        self.resize = None if preparation.size == preparation.network_size else preparation.network_size[1:]
        self.affine = preparation.takes != "normalised"
        if self.affine:
            assert preparation.mean is not None
            assert preparation.std is not None
            std = _channels(preparation.std) * (255 if preparation.takes == "uint8" else 1)
            self.register_buffer("scale", 1 / std)
            self.register_buffer("shift", -_channels(preparation.mean) / _channels(preparation.std))

    def forward(self, images: Tensor) -> Any:
        """The network's outputs for `images`, floating-point ones as float32."""
        x = images.to(torch.float32)
        if self.resize is not None:
            x = F.interpolate(x, self.resize, mode="bilinear", align_corners=False)
        if self.affine:
            x = x * self.scale + self.shift
        y = self.network(x.to(self.dtype))
        if isinstance(y, Tensor):
            return y.to(torch.float32)
        return tuple(part.to(torch.float32) for part in y)


def _channels(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None, None]


def _digits(count: int, size: Size) -> Tensor:
    """Scikit-learn's handwritten digits in [0, 1], resized: [count, C, H, W]."""
    from sklearn.datasets import load_digits

    pixels = torch.from_numpy(load_digits().images[:count]).float()[:, None] / 16
    resized = F.interpolate(pixels, size[1:], mode="bilinear", align_corners=False)
    return resized.expand(-1, size[0], -1, -1)


def _read(folder: Path, count: int, size: Size) -> Tensor:
    files = sampled(image_files(folder, "to check with"), count)
    return torch.stack([read_image(file, size, "to check with") for file in files])


def sampled(items: Sequence[Item], count: int) -> list[Item]:
    """`count` items all over a sequence, or all if there are fewer: sorted files stand class by class.

    Example:
        >>> sampled(range(10), 3), sampled("ab", 3)
        ([0, 3, 6], ['a', 'b'])
    """
    return [items[i * len(items) // count] for i in range(count)] if len(items) > count else list(items)


def image_files(folder: Path, purpose: str) -> list[Path]:
    """The image files of a folder and those below it, sorted.

    Raises:
        ValueError: it is no folder, or holds no image; says for which `purpose`.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder of images {purpose}")
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"{folder} holds no image {purpose} ({', '.join(SUFFIXES)})")
    return files


def read_image(file: Path, size: Size, purpose: str) -> Tensor:
    """An image file in [0, 1], resized: [C, H, W].

    Raises:
        ValueError: it is damaged; names it, and its `purpose`.
    """
    try:
        return pixels_of(decoded(file, 1 if size[0] == 1 else 3), size)
    except Exception as error:  # decoders raise anything for damaged files
        raise ValueError(f"{file}, an image {purpose}, cannot be read: {error}; remove it") from error


def pixels_of(image: Image.Image, size: Size) -> Tensor:
    """An image in [0, 1], resized: [C, H, W]. Networks of other than 1 or 3 channels get these in turn."""
    from torchvision.transforms.functional import to_tensor

    pixels: Tensor = to_tensor(image.resize((size[2], size[1]), Image.Resampling.BILINEAR))
    return pixels[torch.arange(size[0]) % len(pixels)]
