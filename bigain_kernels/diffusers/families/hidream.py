"""HiDream: text behind the image, in blocks of two streams and of one, whose MLPs are mixtures of experts."""

from __future__ import annotations

from typing import Any

from diffusers import HiDreamImageTransformer2DModel

from ...methods import CompressionConfig
from ..context import Grid
from ..hooks import Signature
from ..schedulers import TimestepRange, sigma_steps
from .family import Place
from .rebound import ReboundFamily


class HiDream(ReboundFamily):
    """HiDreamImageTransformer2DModel. What pads a picture that is not square stands behind it and stays whole."""

    model = HiDreamImageTransformer2DModel
    signature = Signature(
        (
            "hidden_states",
            "timesteps",
            "encoder_hidden_states_t5",
            "encoder_hidden_states_llama3",
            "pooled_embeds",
            "img_ids",
            "img_sizes",
        )
    )
    timestep = "timesteps"
    layer_names = r"(double|single)_stream_blocks\.\d+\.block\.attn1"

    def place(self, model: Any, call: dict[str, Any], given: Grid | None) -> Place:
        if call["hidden_states"].dim() == 3:
            height, width = call["img_sizes"][0]
            return Place((int(height), int(width)))
        height, width = call["hidden_states"].shape[-2:]
        return Place((height // model.config.patch_size, width // model.config.patch_size))

    def told(self, config: CompressionConfig) -> TimestepRange:
        return sigma_steps(config.train_timesteps)
