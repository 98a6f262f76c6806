"""LTX-Video: video, text in cross-attention."""

from __future__ import annotations

from typing import Any

from diffusers import LTXVideoTransformer3DModel

from ...methods import CompressionConfig
from ..context import Grid
from ..hooks import Signature
from ..schedulers import TimestepRange, sigma_steps
from .family import Place
from .rebound import ReboundFamily
from .recommended import POOL_VIDEO


class LTX(ReboundFamily):
    """LTXVideoTransformer3DModel."""

    model = LTXVideoTransformer3DModel
    recommended = POOL_VIDEO
    mlp = "ff"
    signature = Signature(
        (
            "hidden_states",
            "encoder_hidden_states",
            "timestep",
            "encoder_attention_mask",
            "num_frames",
            "height",
            "width",
        )
    )

    def place(self, model: Any, call: dict[str, Any], given: Grid | None) -> Place:
        return Place((call["height"], call["width"]), 0, call["num_frames"])

    def told(self, config: CompressionConfig) -> TimestepRange:
        return sigma_steps(config.train_timesteps)
