"""HiDream: text behind the image, in blocks of two streams and of one, whose MLPs are mixtures of experts."""

from __future__ import annotations

from typing import Any

from diffusers import HiDreamImageTransformer2DModel

from ..context import Grid
from ..hooks import Signature
from .family import Place
from .layout import latent_grid, steps_of_sigma
from .rebound import ReboundFamily


class HiDream(ReboundFamily):
    """HiDreamImageTransformer2DModel. What pads a picture that is not square stands behind it and stays whole."""

    model = HiDreamImageTransformer2DModel
    signature = Signature(hidden_states=0, timesteps=1, img_sizes=6)
    told = steps_of_sigma
    timestep = "timesteps"
    layer_names = r"(double|single)_stream_blocks\.\d+\.block\.attn1"

    def place(self, model: Any, call: dict[str, Any], given: Grid | None) -> Place:
        if call["hidden_states"].dim() == 3:
            height, width = call["img_sizes"][0]
            return Place((int(height), int(width)))
        return Place(latent_grid(model, call["hidden_states"]))
