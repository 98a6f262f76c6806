"""LTX-2: video and sound; the self-attention of the video is compressed."""

from __future__ import annotations

from typing import Any

from diffusers import LTX2VideoTransformer3DModel

from ..context import Grid
from ..hooks import Signature
from .family import Place
from .layout import video_place
from .ltx import LTX
from .recommended import POOL_VIDEO


class LTX2(LTX):
    """LTX2VideoTransformer3DModel."""

    model = LTX2VideoTransformer3DModel
    recommended = POOL_VIDEO
    mlp = "ff"
    signature = Signature(hidden_states=0, timestep=4, num_frames=10, height=11, width=12, video_coords=15)

    def place(self, model: Any, call: dict[str, Any], given: Grid | None) -> Place:
        return video_place(model, call, model.config.patch_size, model.config.patch_size_t)
