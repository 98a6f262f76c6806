"""HunyuanDiT: image tokens alone, rotated; text in cross-attention."""

from __future__ import annotations

from typing import Any

from diffusers import HunyuanDiT2DModel

from ..context import Grid
from ..hooks import Signature
from .family import Place
from .rebound import ReboundFamily


class HunyuanDiT(ReboundFamily):
    """HunyuanDiT2DModel."""

    model = HunyuanDiT2DModel
    mlp = "ff"
    signature = Signature(("hidden_states", "timestep"))
    layer_names = r"blocks\.\d+\.attn1"

    def place(self, model: Any, call: dict[str, Any], given: Grid | None) -> Place:
        height, width = call["hidden_states"].shape[-2:]
        return Place((height // model.config.patch_size, width // model.config.patch_size))
