"""AuraFlow: registers and text in front of the image, in blocks of two streams and of one."""

from __future__ import annotations

from typing import Any

from diffusers import AuraFlowTransformer2DModel

from ..context import Grid
from ..hooks import Signature
from .family import Layer, Place
from .layout import latent_grid, sigma
from .rebound import ReboundFamily


class AuraFlow(ReboundFamily):
    """AuraFlowTransformer2DModel."""

    model = AuraFlowTransformer2DModel
    mlp = "ff"
    signature = Signature(hidden_states=0, encoder_hidden_states=1, timestep=2)
    told = sigma
    layer_names = r"(joint|single)_transformer_blocks\.\d+\.attn"

    def place(self, model: Any, call: dict[str, Any], given: Grid | None) -> Place:
        text = model.register_tokens.shape[1] + call["encoder_hidden_states"].shape[1]
        return Place(latent_grid(model, call["hidden_states"]), text)

    def text_in_mlp(self, layer: Layer) -> bool:
        return layer.name.startswith("single_")
