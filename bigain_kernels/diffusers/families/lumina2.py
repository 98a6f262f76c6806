"""Lumina Image 2: text in front of the image in one sequence, as long as the text of each row."""

from __future__ import annotations

from typing import Any

from diffusers import Lumina2Transformer2DModel

from ..context import Grid
from ..hooks import Signature
from .family import Layer, Place
from .layout import latent_grid, one_minus_sigma
from .rebound import ReboundFamily


class Lumina2(ReboundFamily):
    """Lumina2Transformer2DModel: its main layers; the refiners in front of them run as they are.

    The rows of a batch must have prompts of one length, because their images stand in one place then.
    """

    model = Lumina2Transformer2DModel
    mlp = "feed_forward"
    signature = Signature(hidden_states=0, timestep=1, encoder_attention_mask=3)
    told = one_minus_sigma
    layer_names = r"layers\.\d+\.attn"

    def place(self, model: Any, call: dict[str, Any], given: Grid | None) -> Place:
        # The model itself reads the lengths on the host.
        lengths = call["encoder_attention_mask"].sum(dim=1).tolist()
        if len(set(lengths)) != 1:
            raise ValueError(
                f"encoder_attention_mask: got prompts of {lengths} tokens in one batch, expected one length: image "
                "tokens stand behind the text, and are merged and pooled in one place for all rows"
            )
        return Place(latent_grid(model, call["hidden_states"]), int(lengths[0]))

    def text_in_mlp(self, layer: Layer) -> bool:
        return True
