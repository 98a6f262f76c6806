"""Flux.2: text in front of the image, in blocks of two streams and of one, all rotated by position."""

from __future__ import annotations

from typing import Any

from diffusers import Flux2Transformer2DModel
from diffusers.models.transformers.transformer_flux2 import Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor

from ...methods import CompressionConfig
from ..context import Grid
from ..hooks import Signature
from ..schedulers import SIGMA, TimestepRange
from .family import Place
from .rebound import ReboundFamily


class Flux2(ReboundFamily):
    """Flux2Transformer2DModel. Tokens of reference pictures behind the image stay whole."""

    model = Flux2Transformer2DModel
    mlp = "ff"
    merges = ("hidden", "attention")
    no_mlp = "its MLP runs inside its attention, and is merged with it"
    signature = Signature(
        (
            "hidden_states",
            "encoder_hidden_states",
            "timestep",
            "img_ids",
            "txt_ids",
            "guidance",
            "joint_attention_kwargs",
        ),
        "joint_attention_kwargs",
    )
    layer_names = r"(single_)?transformer_blocks\.\d+\.attn"
    # The processors that keep the keys of reference pictures from one pass to the next are not among them.
    replaceable = (Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor)

    def place(self, model: Any, call: dict[str, Any], given: Grid | None) -> Place:
        grid = model._bigain.grid_reader(call["img_ids"]) if given is None else given
        return Place(grid, call["encoder_hidden_states"].shape[1])

    def told(self, config: CompressionConfig) -> TimestepRange:
        return SIGMA
