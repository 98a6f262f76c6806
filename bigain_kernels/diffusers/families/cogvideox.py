"""CogVideoX: text in front of the video."""

from __future__ import annotations

from typing import Any

from diffusers import CogVideoXTransformer3DModel

from ..context import Grid
from ..hooks import Signature
from .family import Place
from .rebound import ReboundFamily
from .recommended import POOL_VIDEO


class CogVideoX(ReboundFamily):
    """CogVideoXTransformer3DModel, of (B, frames, C, H, W)."""

    model = CogVideoXTransformer3DModel
    recommended = POOL_VIDEO
    signature = Signature(("hidden_states", "encoder_hidden_states", "timestep"))

    def place(self, model: Any, call: dict[str, Any], given: Grid | None) -> Place:
        frames, _, height, width = call["hidden_states"].shape[1:]
        size, time = model.config.patch_size, model.config.patch_size_t or 1
        return Place((height // size, width // size), call["encoder_hidden_states"].shape[1], frames // time)
