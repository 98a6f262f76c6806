"""CogView4: text in front of the image in one sequence, the image rotated."""

from __future__ import annotations

from diffusers import CogView4Transformer2DModel

from ..hooks import Signature
from .layout import of_latent_behind_text, steps_of_sigma
from .rebound import ReboundFamily


class CogView4(ReboundFamily):
    """CogView4Transformer2DModel."""

    model = CogView4Transformer2DModel
    signature = Signature(hidden_states=0, encoder_hidden_states=1, timestep=2)
    place = of_latent_behind_text
    told = steps_of_sigma
