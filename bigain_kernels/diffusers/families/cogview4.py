"""CogView4: text in front of the image in one sequence, the image rotated."""

from __future__ import annotations

from typing import Any

from diffusers import CogView4Transformer2DModel

from ...methods import CompressionConfig
from ..context import Grid
from ..hooks import Signature
from ..schedulers import TimestepRange, sigma_steps
from .family import Place
from .rebound import ReboundFamily


class CogView4(ReboundFamily):
    """CogView4Transformer2DModel."""

    model = CogView4Transformer2DModel
    signature = Signature(("hidden_states", "encoder_hidden_states", "timestep"))

    def place(self, model: Any, call: dict[str, Any], given: Grid | None) -> Place:
        height, width = call["hidden_states"].shape[-2:]
        size = model.config.patch_size
        return Place((height // size, width // size), call["encoder_hidden_states"].shape[1])

    def told(self, config: CompressionConfig) -> TimestepRange:
        return sigma_steps(config.train_timesteps)
