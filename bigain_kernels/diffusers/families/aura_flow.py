"""AuraFlow: registers and text in front of the image, in blocks of two streams and of one."""

from __future__ import annotations

from typing import Any

from diffusers import AuraFlowTransformer2DModel

from ...methods import CompressionConfig
from ..context import Grid
from ..hooks import Signature
from ..schedulers import SIGMA, TimestepRange
from .family import Place
from .rebound import ReboundFamily


class AuraFlow(ReboundFamily):
    """AuraFlowTransformer2DModel."""

    model = AuraFlowTransformer2DModel
    signature = Signature(("hidden_states", "encoder_hidden_states", "timestep"))
    layer_names = r"(joint|single)_transformer_blocks\.\d+\.attn"

    def place(self, model: Any, call: dict[str, Any], given: Grid | None) -> Place:
        height, width = call["hidden_states"].shape[-2:]
        size = model.config.patch_size
        text = model.register_tokens.shape[1] + call["encoder_hidden_states"].shape[1]
        return Place((height // size, width // size), text)

    def told(self, config: CompressionConfig) -> TimestepRange:
        return SIGMA
