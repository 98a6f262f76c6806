"""CogVideoX: text in front of the video."""

from __future__ import annotations

from typing import Any

from diffusers import CogVideoXTransformer3DModel

from ..context import Grid
from ..hooks import Signature
from .family import Layer, Place
from .layout import latent_grid
from .rebound import ReboundFamily
from .recommended import POOL_VIDEO


class CogVideoX(ReboundFamily):
    """CogVideoXTransformer3DModel, of (B, frames, C, H, W)."""

    model = CogVideoXTransformer3DModel
    recommended = POOL_VIDEO
    mlp = "ff"
    signature = Signature(hidden_states=0, encoder_hidden_states=1, timestep=2)

    def place(self, model: Any, call: dict[str, Any], given: Grid | None) -> Place:
        x, time = call["hidden_states"], model.config.patch_size_t or 1
        return Place(latent_grid(model, x), call["encoder_hidden_states"].shape[1], x.shape[1] // time)

    def text_in_mlp(self, layer: Layer) -> bool:
        return True
