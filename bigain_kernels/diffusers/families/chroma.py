"""Chroma: Flux with masked text."""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers import ChromaTransformer2DModel
from diffusers.models.transformers.transformer_chroma import ChromaSingleTransformerBlock

from ...methods import CompressionConfig
from ..context import Grid
from ..hooks import Signature, WholeForm, Wholes
from ..schedulers import SIGMA, TimestepRange
from .family import Place
from .rebound import ReboundFamily


class Chroma(ReboundFamily):
    """ChromaTransformer2DModel."""

    model = ChromaTransformer2DModel
    mlp = "ff"
    wholes: ClassVar[Wholes] = {ChromaSingleTransformerBlock: WholeForm(has_text=True, returned=None)}
    merges = ("hidden", "attention")
    signature = Signature(
        (
            "hidden_states",
            "encoder_hidden_states",
            "timestep",
            "img_ids",
            "txt_ids",
            "attention_mask",
            "joint_attention_kwargs",
        ),
        "joint_attention_kwargs",
    )
    layer_names = r"(single_)?transformer_blocks\.\d+\.attn"

    def place(self, model: Any, call: dict[str, Any], given: Grid | None) -> Place:
        grid = model._bigain.grid_reader(call["img_ids"]) if given is None else given
        return Place(grid, call["encoder_hidden_states"].shape[1])

    def told(self, config: CompressionConfig) -> TimestepRange:
        return SIGMA
