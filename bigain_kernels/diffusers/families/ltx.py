"""LTX-Video: video, text in cross-attention."""

from __future__ import annotations

from typing import Any

from diffusers import LTXVideoTransformer3DModel

from ..context import Grid
from ..hooks import Signature
from .family import Place
from .layout import steps_of_sigma, video_place
from .rebound import ReboundFamily
from .recommended import POOL_VIDEO


class LTX(ReboundFamily):
    """LTXVideoTransformer3DModel."""

    model = LTXVideoTransformer3DModel
    recommended = POOL_VIDEO
    mlp = "ff"
    signature = Signature(hidden_states=0, timestep=2, num_frames=4, height=5, width=6, video_coords=8)
    told = steps_of_sigma

    def place(self, model: Any, call: dict[str, Any], given: Grid | None) -> Place:
        return video_place(model, call)
