"""Lumina Image 2: text in front of the image in one sequence, as long as the text of each row."""

from __future__ import annotations

from typing import Any

from diffusers import Lumina2Transformer2DModel

from ...methods import CompressionConfig
from ..context import Grid
from ..hooks import Signature
from ..schedulers import TimestepRange
from .family import Place
from .rebound import ReboundFamily


class Lumina2(ReboundFamily):
    """Lumina2Transformer2DModel: its main layers; the refiners in front of them run as they are.

    The rows of a batch must have prompts of one length, because their images stand in one place then.
    """

    model = Lumina2Transformer2DModel
    signature = Signature(("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask"))
    layer_names = r"layers\.\d+\.attn"

    def place(self, model: Any, call: dict[str, Any], given: Grid | None) -> Place:
        # The model itself reads the lengths on the host.
        lengths = call["encoder_attention_mask"].sum(dim=1).tolist()
        if len(set(lengths)) != 1:
            raise ValueError(
                f"encoder_attention_mask: got prompts of {lengths} tokens in one batch, expected one length: image "
                "tokens stand behind the text, and are merged and pooled in one place for all rows"
            )
        height, width = call["hidden_states"].shape[-2:]
        size = model.config.patch_size
        return Place((height // size, width // size), int(lengths[0]))

    def told(self, config: CompressionConfig) -> TimestepRange:
        return TimestepRange(1.0, 0.0)  # 1 - sigma
