"""Flux.2: text in front of the image, in blocks of two streams and of one, all rotated by position."""

from __future__ import annotations

from diffusers import Flux2Transformer2DModel
from diffusers.models.transformers.transformer_flux2 import Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor

from ..hooks import Signature
from .layout import of_img_ids, sigma
from .rebound import ReboundFamily


class Flux2(ReboundFamily):
    """Flux2Transformer2DModel. Tokens of reference pictures behind the image stay whole."""

    model = Flux2Transformer2DModel
    mlp = "ff"
    merges = ("hidden", "attention")
    no_mlp = "its MLP runs inside its attention, and is merged with it"
    signature = Signature(hidden_states=0, encoder_hidden_states=1, timestep=2, img_ids=3, joint_attention_kwargs=6)
    place = of_img_ids
    told = sigma
    layer_names = r"(single_)?transformer_blocks\.\d+\.attn"
    # The processors that keep the keys of reference pictures from one pass to the next are not among them.
    replaceable = (Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor)
