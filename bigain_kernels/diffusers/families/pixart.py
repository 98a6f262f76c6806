"""PixArt alpha and sigma: a DiT with text in cross-attention."""

from __future__ import annotations

from typing import Any

from diffusers import PixArtTransformer2DModel

from ..context import Grid
from ..hooks import Signature
from .dit import DiT
from .family import Place
from .recommended import MERGE_PIXART


class PixArt(DiT):
    """PixArtTransformer2DModel. Tokens are matched on the input of the attention, as in DiT."""

    model = PixArtTransformer2DModel
    recommended = MERGE_PIXART
    signature = Signature(
        ("hidden_states", "encoder_hidden_states", "timestep", "added_cond_kwargs", "cross_attention_kwargs"),
        "cross_attention_kwargs",
    )

    def place(self, model: Any, call: dict[str, Any], given: Grid | None) -> Place:
        height, width = call["hidden_states"].shape[-2:]
        return Place((height // model.config.patch_size, width // model.config.patch_size))
