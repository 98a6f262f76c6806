"""Latte: each frame attends to itself, then each place to itself over time."""

from __future__ import annotations

from diffusers import LatteTransformer3DModel

from ..hooks import Signature
from .layout import of_latent
from .rebound import ReboundFamily
from .recommended import POOL_VIDEO


class Latte(ReboundFamily):
    """LatteTransformer3DModel: its spatial blocks, in which every frame is a row of the batch."""

    model = LatteTransformer3DModel
    recommended = POOL_VIDEO
    mlp = "ff"
    signature = Signature(hidden_states=0, timestep=1)
    place = of_latent
