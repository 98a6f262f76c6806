"""Z-Image: text behind the image, lists of pictures instead of batches."""

from __future__ import annotations

from typing import Any

from diffusers import ZImageTransformer2DModel

from ...methods import CompressionConfig
from ..context import Grid
from ..hooks import Signature
from ..schedulers import TimestepRange
from .family import Place
from .rebound import ReboundFamily


class ZImage(ReboundFamily):
    """ZImageTransformer2DModel: its main layers; the refiners in front of them, two small ones, run as they are."""

    model = ZImageTransformer2DModel
    mlp = "feed_forward"
    block = Signature(("x",))
    signature = Signature(
        (
            "x",
            "t",
            "cap_feats",
            "return_dict",
            "controlnet_block_samples",
            "siglip_feats",
            "image_noise_mask",
            "patch_size",
            "f_patch_size",
        )
    )
    sample = timestep = "t"
    layer_names = r"layers\.\d+\.attention"

    def place(self, model: Any, call: dict[str, Any], given: Grid | None) -> Place:
        pictures = call["x"]
        shapes = {tuple(x.shape[1:]) if hasattr(x, "shape") else None for x in pictures}
        if len(shapes) != 1 or None in shapes:
            raise ValueError(f"x: got pictures of shapes {list(shapes)}, expected one shape (C, frames, H, W) for all")
        frames, height, width = pictures[0].shape[1:]
        size, time = call["patch_size"] or 2, call["f_patch_size"] or 1
        return Place((height // size, width // size), 0, frames // time)

    def told(self, config: CompressionConfig) -> TimestepRange:
        return TimestepRange(1.0, 0.0)  # 1 - sigma
