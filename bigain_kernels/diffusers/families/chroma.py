"""Chroma: Flux with masked text."""

from __future__ import annotations

from typing import ClassVar

from diffusers import ChromaTransformer2DModel
from diffusers.models.transformers.transformer_chroma import ChromaSingleTransformerBlock

from ..hooks import Signature, WholeForm, Wholes
from .layout import of_img_ids, sigma
from .rebound import ReboundFamily


class Chroma(ReboundFamily):
    """ChromaTransformer2DModel."""

    model = ChromaTransformer2DModel
    mlp = "ff"
    wholes: ClassVar[Wholes] = {ChromaSingleTransformerBlock: WholeForm(has_text=True, returned=None)}
    merges = ("hidden", "attention")
    signature = Signature(hidden_states=0, encoder_hidden_states=1, timestep=2, img_ids=3, joint_attention_kwargs=6)
    place = of_img_ids
    told = sigma
    layer_names = r"(single_)?transformer_blocks\.\d+\.attn"
