"""What models share whose text and image attend to each other in one attention."""

from __future__ import annotations

from typing import Any

from ..hooks import Signature
from .family import Family, Layer
from .recommended import POOL


class JointFamily(Family):
    """Blocks of two streams, then, in some families, those of one. Joint attention counts as self-attention."""

    block = Signature(hidden_states=0, joint_attention_kwargs=4)
    mlp = "ff"
    recommended = POOL

    def layers(self, model: Any) -> list[Layer]:
        blocks = [(f"transformer_blocks.{i}", block) for i, block in enumerate(model.transformer_blocks)]
        single = getattr(model, "single_transformer_blocks", ())
        blocks += [(f"single_transformer_blocks.{i}", block) for i, block in enumerate(single)]
        # attn2 is the second self-attention of Stable Diffusion 3.5's dual attention: it sees the image alone.
        return [
            Layer(f"{name}.{which}", "attn1", index, getattr(block, which), block)
            for index, (name, block) in enumerate(blocks)
            for which in ("attn", "attn2")
            if getattr(block, which, None) is not None
        ]
