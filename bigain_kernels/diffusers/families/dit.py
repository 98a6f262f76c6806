"""DiT: one grid, image tokens alone."""

from __future__ import annotations

from typing import Any

from diffusers import DiTTransformer2DModel

from ..hooks import Signature
from .family import Layer
from .layout import of_latent
from .plain import PlainFamily
from .recommended import MERGE_DIT


class DiT(PlainFamily):
    """DiTTransformer2DModel, class-conditional. Tokens are matched on the input of the attention."""

    model = DiTTransformer2DModel
    recommended = MERGE_DIT
    signature = Signature(hidden_states=0, timestep=1, cross_attention_kwargs=3)
    place = of_latent

    def layers(self, model: Any) -> list[Layer]:
        return [
            Layer(f"transformer_blocks.{index}.{kind}", kind, index, getattr(block, kind), block)
            for index, block in enumerate(model.transformer_blocks)
            for kind in ("attn1", "attn2")
            if getattr(block, kind) is not None
        ]
