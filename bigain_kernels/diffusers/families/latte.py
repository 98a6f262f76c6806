"""Latte: each frame attends to itself, then each place to itself over time."""

from __future__ import annotations

from typing import Any

from diffusers import LatteTransformer3DModel

from ..context import Grid
from ..hooks import Signature
from .family import Place
from .rebound import ReboundFamily
from .recommended import POOL_VIDEO


class Latte(ReboundFamily):
    """LatteTransformer3DModel: its spatial blocks, in which every frame is a row of the batch."""

    model = LatteTransformer3DModel
    recommended = POOL_VIDEO
    mlp = "ff"
    signature = Signature(("hidden_states", "timestep"))

    def place(self, model: Any, call: dict[str, Any], given: Grid | None) -> Place:
        height, width = call["hidden_states"].shape[-2:]
        return Place((height // model.config.patch_size, width // model.config.patch_size))
