"""Wan 2.1 and 2.2: video, text in cross-attention."""

from __future__ import annotations

from typing import Any

from diffusers import WanTransformer3DModel

from ...methods import CompressionConfig
from ..context import Grid
from ..hooks import Signature
from ..schedulers import TimestepRange, sigma_steps
from .family import Place
from .rebound import ReboundFamily
from .recommended import POOL_VIDEO


class Wan(ReboundFamily):
    """WanTransformer3DModel, text to video and image to video."""

    model = WanTransformer3DModel
    recommended = POOL_VIDEO
    signature = Signature(("hidden_states", "timestep"))
    layer_names = r"blocks\.\d+\.attn1"
    mlp = "ffn"
    merges = ("hidden", "attention")

    def place(self, model: Any, call: dict[str, Any], given: Grid | None) -> Place:
        frames, height, width = call["hidden_states"].shape[-3:]
        time, rows, columns = model.config.patch_size
        return Place((height // rows, width // columns), 0, frames // time)

    def told(self, config: CompressionConfig) -> TimestepRange:
        return sigma_steps(config.train_timesteps)
