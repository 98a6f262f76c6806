"""DiT: one grid, image tokens alone."""

from __future__ import annotations

from typing import Any

from diffusers import DiTTransformer2DModel

from ..context import Grid
from ..hooks import Signature
from .family import Layer, Place
from .plain import PlainFamily
from .recommended import MERGE_DIT


class DiT(PlainFamily):
    """DiTTransformer2DModel, class-conditional. Tokens are matched on the input of the attention."""

    model = DiTTransformer2DModel
    recommended = MERGE_DIT
    signature = Signature(
        ("hidden_states", "timestep", "class_labels", "cross_attention_kwargs"), "cross_attention_kwargs"
    )

    def layers(self, model: Any) -> list[Layer]:
        return [
            Layer(f"transformer_blocks.{index}.{kind}", kind, index, getattr(block, kind), block)
            for index, block in enumerate(model.transformer_blocks)
            for kind in ("attn1", "attn2")
            if getattr(block, kind) is not None
        ]

    def place(self, model: Any, call: dict[str, Any], given: Grid | None) -> Place:
        height, width = call["hidden_states"].shape[-2:]
        return Place((height // model.patch_size, width // model.patch_size))
