"""Put the forms that engines run well in the places of parts: `use_export_forms`."""

from __future__ import annotations

from torch import nn

from pliant.parts import Network, Target, hooked, parts, replace_parts


def check_exportable(network: nn.Module) -> None:
    """Refuse a network with a part that no file can hold.

    Raises:
        ValueError: names the part, and says why.
    """
    for path, part in parts(network).items():
        if reason := part.no_export():
            raise ValueError(f"{path or type(network).__name__} {reason}")


def use_export_forms(model: Network, target: Target, batch: int | None) -> Network:
    """Put export forms in the places of parts, in `model` itself; a part with hooks stays, and they run.

    Args:
        model: a network in evaluation mode, its norms folded where they can be.
        target: what runs the file.
        batch: images of each call; None: any number.

    Returns:
        `model`; its form, if it is one part by itself.

    Raises:
        ValueError: no file can hold a part (`Part.no_export`).

    Example:
        >>> import timm, torch
        >>> model = timm.create_model("resnet20_cifar_mod").eval()
        >>> x = torch.randn(2, 3, 32, 32)
        >>> expected = model(x)
        >>> torch.allclose(use_export_forms(model, "onnx", None)(x), expected, atol=1e-4)
        True
    """
    check_exportable(model)
    return replace_parts(
        model, lambda _, part: None if hooked(part) else part.export_form(target, batch)
    )
