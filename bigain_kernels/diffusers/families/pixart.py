"""PixArt alpha and sigma: a DiT with text in cross-attention."""

from __future__ import annotations

from diffusers import PixArtTransformer2DModel

from ..hooks import Signature
from .dit import DiT
from .recommended import MERGE_PIXART


class PixArt(DiT):
    """PixArtTransformer2DModel. Tokens are matched on the input of the attention, as in DiT."""

    model = PixArtTransformer2DModel
    recommended = MERGE_PIXART
    signature = Signature(hidden_states=0, timestep=2, cross_attention_kwargs=4)
