"""Z-Image: text behind the image, lists of pictures instead of batches."""

from __future__ import annotations

from typing import Any

from diffusers import ZImageTransformer2DModel

from ..context import Grid
from ..hooks import Signature
from .family import Place
from .layout import one_minus_sigma
from .rebound import ReboundFamily


class ZImage(ReboundFamily):
    """ZImageTransformer2DModel: its main layers; the refiners in front of them, two small ones, run as they are."""

    model = ZImageTransformer2DModel
    mlp = "feed_forward"
    block = Signature(x=0)
    signature = Signature(x=0, t=1, patch_size=7, f_patch_size=8)
    told = one_minus_sigma
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
