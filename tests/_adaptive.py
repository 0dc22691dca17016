"""Small adaptive networks of every family, and what the tests of adaptive depth do with them."""

from __future__ import annotations

import contextvars
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import timm
import torch
from torch import nn

from pliant import AdaptiveDepth, convert, get_depth, subnet

SMALL_CONVNEXT = {"depths": (2, 1, 3, 2), "dims": (8, 16, 24, 32)}
SMALL_VIT = {"img_size": 32, "embed_dim": 32, "num_heads": 2, "depth": 4}

# Network, its arguments, options of the method, flags.
FAMILIES = {
    "basic": ("resnet18_cifar", {"channels": (8, 16, 24, 32)}, {}, 4),
    "bottleneck": ("resnet26", {}, {}, 4),
    "option A": ("resnet20_cifar", {}, {}, 3),
    "mobilenetv2": ("mobilenetv2_035", {}, {}, 5),
    "convnext, linear": ("convnext_atto", {**SMALL_CONVNEXT, "conv_mlp": False}, {}, 3),
    "convnext, conv": ("convnext_atto", {**SMALL_CONVNEXT, "conv_mlp": True}, {}, 3),
    "regnetx": ("regnetx_002", {}, {}, 2),
    "regnety": ("regnety_002", {}, {}, 2),
    "efficientnet": ("efficientnet_lite0", {}, {}, 5),
    "mobilenetv3": ("mobilenetv3_small_050", {}, {}, 4),
    "vit": ("vit_tiny_patch16_224", SMALL_VIT, {"groups": 2}, 2),
    "vit, norms in attention": (
        "vit_tiny_patch16_224",
        {**SMALL_VIT, "qk_norm": True},
        {"groups": 2},
        2,
    ),
    "deit": ("deit_tiny_distilled_patch16_224", SMALL_VIT, {"groups": 1}, 1),
}

FULL, BASE, MIXED = (False,) * 3, (True,) * 3, (True, False, True)  # of "option A"


def scramble(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give a network weights as of a trained one: no norm alike, no branch near zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point():
                continue
            if tensor.dim() > 1:  # kernels: torch's and timm's own, but never zero
                spread = (1 / max(1, tensor[0].numel())) ** 0.5
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * spread)
            elif name.endswith(("bias", "mean")):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
            else:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model


def plain(family: str) -> nn.Module:
    """The network of a family before its conversion, in evaluation."""
    name, arguments, _, _ = FAMILIES[family]
    return scramble(timm.create_model(name, num_classes=5, **arguments)).eval()


def adaptive(family: str = "option A") -> nn.Module:
    """An adaptive network of a family, all of whose norms differ, in evaluation."""
    return scramble(convert(plain(family), AdaptiveDepth(**FAMILIES[family][2])), seed=1)


def all_skips(flags: int) -> list[tuple[bool, ...]]:
    """Every depth, the whole network first."""
    return list(product((False, True), repeat=flags))


def images(batch: int = 2, size: int = 32) -> torch.Tensor:
    """Random images."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(2))


def outputs(model, x, skips=None) -> dict[tuple[bool, ...], torch.Tensor]:
    """What each depth gives, by cutting it out."""
    with torch.no_grad():
        return {skip: subnet(model, skip)(x) for skip in skips or all_skips(len(get_depth(model)))}


def in_thread(work):
    """What `work` gives in another thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def dynamo_reads_contexts() -> bool:
    """Whether `torch.compile` can read a `ContextVar`: torch 2.11 cannot."""
    torch._dynamo.reset()
    variable = contextvars.ContextVar("tried", default=1)
    try:
        torch.compile(lambda x: x * variable.get(), backend="eager", fullgraph=True)(torch.ones(1))
    except torch._dynamo.exc.Unsupported:
        return False
    return True
