"""Allegro: video, text in cross-attention."""

from __future__ import annotations

from typing import Any

from diffusers import AllegroTransformer3DModel

from ..context import Grid
from ..hooks import Signature
from .family import Place
from .rebound import ReboundFamily
from .recommended import POOL_VIDEO


class Allegro(ReboundFamily):
    """AllegroTransformer3DModel."""

    model = AllegroTransformer3DModel
    recommended = POOL_VIDEO
    mlp = "ff"
    signature = Signature(("hidden_states", "encoder_hidden_states", "timestep"))

    def place(self, model: Any, call: dict[str, Any], given: Grid | None) -> Place:
        frames, height, width = call["hidden_states"].shape[-3:]
        size, time = model.config.patch_size, model.config.patch_size_t
        return Place((height // size, width // size), 0, frames // time)
