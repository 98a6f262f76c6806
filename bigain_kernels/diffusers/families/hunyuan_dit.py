"""HunyuanDiT: image tokens alone, rotated; text in cross-attention."""

from __future__ import annotations

from diffusers import HunyuanDiT2DModel

from ..hooks import Signature
from .layout import of_latent
from .rebound import ReboundFamily


class HunyuanDiT(ReboundFamily):
    """HunyuanDiT2DModel."""

    model = HunyuanDiT2DModel
    mlp = "ff"
    signature = Signature(hidden_states=0, timestep=1)
    place = of_latent
    layer_names = r"blocks\.\d+\.attn1"
