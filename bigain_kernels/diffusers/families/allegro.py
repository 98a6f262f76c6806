"""Allegro: video, text in cross-attention."""

from __future__ import annotations

from diffusers import AllegroTransformer3DModel

from ..hooks import Signature
from .layout import of_latent_video
from .rebound import ReboundFamily
from .recommended import POOL_VIDEO


class Allegro(ReboundFamily):
    """AllegroTransformer3DModel."""

    model = AllegroTransformer3DModel
    recommended = POOL_VIDEO
    mlp = "ff"
    signature = Signature(hidden_states=0, timestep=2)
    place = of_latent_video
