"""HunyuanVideo: masked text behind the video."""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers import HunyuanVideoTransformer3DModel
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoSingleTransformerBlock

from ...methods import CompressionConfig
from ..context import Grid
from ..hooks import Signature, WholeForm, Wholes
from ..schedulers import TimestepRange, sigma_steps
from .family import Place
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
    signature = Signature(("hidden_states", "timestep"))
    layer_names = r"(single_)?transformer_blocks\.\d+\.attn"

    def place(self, model: Any, call: dict[str, Any], given: Grid | None) -> Place:
        frames, height, width = call["hidden_states"].shape[-3:]
        size, time = model.config.patch_size, model.config.patch_size_t
        return Place((height // size, width // size), 0, frames // time)

    def told(self, config: CompressionConfig) -> TimestepRange:
        return sigma_steps(config.train_timesteps)
