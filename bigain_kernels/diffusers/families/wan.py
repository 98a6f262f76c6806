"""Wan 2.1 and 2.2: video, text in cross-attention."""

from __future__ import annotations

from diffusers import WanTransformer3DModel

from ..hooks import Signature
from .layout import of_latent_video, steps_of_sigma
from .rebound import ReboundFamily
from .recommended import POOL_VIDEO


class Wan(ReboundFamily):
    """WanTransformer3DModel, text to video and image to video."""

    model = WanTransformer3DModel
    recommended = POOL_VIDEO
    signature = Signature(hidden_states=0, timestep=1)
    place = of_latent_video
    told = steps_of_sigma
    layer_names = r"blocks\.\d+\.attn1"
    mlp = "ffn"
    merges = ("hidden", "attention")
