"""HunyuanVideo: masked text behind the video."""

from __future__ import annotations

from typing import ClassVar

from diffusers import HunyuanVideoTransformer3DModel
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoSingleTransformerBlock

from ..hooks import Signature, WholeForm, Wholes
from .layout import of_latent_video, steps_of_sigma
from .rebound import ReboundFamily
from .recommended import POOL_VIDEO


class HunyuanVideo(ReboundFamily):
    """HunyuanVideoTransformer3DModel."""

    model = HunyuanVideoTransformer3DModel
    recommended = POOL_VIDEO
    mlp = "ff"
    # Those that replace tokens count the ones of their first frame.
    wholes: ClassVar[Wholes] = {HunyuanVideoSingleTransformerBlock: WholeForm(has_text=False, returned=0)}
    merges = ("hidden", "attention")
    signature = Signature(hidden_states=0, timestep=1)
    place = of_latent_video
    told = steps_of_sigma
    layer_names = r"(single_)?transformer_blocks\.\d+\.attn"
