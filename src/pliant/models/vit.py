"""Plain vision transformers of twelve layers: ViT-Base and DeiT-Tiny (Dosovitskiy 2021; Touvron 2021).

timm has them under longer names, with the size of their images.
"""

from __future__ import annotations

from functools import partial

from timm.models.vision_transformer import VisionTransformer

from pliant.models._build import PlainNetwork

_SIZES = {
    "vit_base_patch32": {"patch_size": 32, "embed_dim": 768, "depth": 12, "num_heads": 12},
    "vit_tiny_patch16": {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3},
}

VITS = {
    name: PlainNetwork(
        build=partial(VisionTransformer, **size),
        reduction=None,
        config={"first_conv": "patch_embed.proj", "classifier": "head", "fixed_input_size": True},
        feature_levels=(2, 5, 8, 11),  # a quarter of the layers each
        feature_class="getter",
    )
    for name, size in _SIZES.items()
}
