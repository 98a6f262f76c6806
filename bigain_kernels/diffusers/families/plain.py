"""Self- and cross-attention by diffusers' `Attention` and its plain processors, as U-Nets and DiTs have it."""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import Tensor

from ...methods import CompressionConfig
from ..attention import CompressedAttention, refuse_mask
from ..context import Context
from ..hooks import Signature
from ..steps import States, Step
from .family import Family, Layer


class CompressedAttnProcessor(CompressedAttention):
    """Merges or pools around an attention: (B, N, C) of the norm before it to (B, N, C).

    In cross-attention, and where self-attention is given keys other than its own tokens (a reference picture's behind
    them, say), only queries are merged, a mask over the keys stays what it is, and nothing is pooled.
    """

    fused: ClassVar[bool] = False

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        bigain: Context | None = None,
    ) -> Tensor:
        keys, mask = encoder_hidden_states, attention_mask
        step = self.step(attn, bigain, hidden_states, own_keys=keys is None)
        if step is None:
            step = Step()
        elif keys is None or (mask is not None and mask.dim() == 3 and mask.shape[1] != 1):
            refuse_mask(mask)
        if mask is not None:
            tokens = hidden_states if keys is None else keys
            mask = attn.prepare_attention_mask(mask, tokens.shape[1], tokens.shape[0])
            mask = mask.unflatten(0, (tokens.shape[0], attn.heads))
        if keys is not None and attn.norm_cross is not None:
            keys = attn.norm_encoder_hidden_states(keys)
        x, _ = self.run(step, attn, hidden_states, keys=keys, mask=mask)
        return step.leave(self.output(attn, x))

    def uses_fused(self, attn: Any) -> bool:
        return self.fused

    def project(self, attn: Any, x: Tensor, keys: Tensor | None = None) -> States:
        if not self.fused:
            return super().project(attn, x, keys)
        if keys is None:
            return attn.to_qkv(x).chunk(3, dim=-1)
        return attn.to_q(x), *attn.to_kv(keys).chunk(2, dim=-1)


class FusedCompressedAttnProcessor(CompressedAttnProcessor):
    """`CompressedAttnProcessor` with the fused projections of `fuse_qkv_projections`."""

    fused: ClassVar[bool] = True


class PlainFamily(Family):
    """What U-Nets and DiTs share."""

    block = Signature(hidden_states=0, cross_attention_kwargs=5)
    mlp = "ff"
    processors = (CompressedAttnProcessor, FusedCompressedAttnProcessor)
    replaceable = (AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)

    def stand_in(self, previous: Any) -> CompressedAttention:
        return self.processors[isinstance(previous, FusedAttnProcessor2_0)]()

    def refuses(self, config: CompressionConfig, layer: Layer) -> str | None:
        attn = layer.attn
        if attn.group_norm is not None or attn.spatial_norm is not None:
            return "its input norm looks at all tokens"
        if attn.residual_connection or attn.rescale_output_factor != 1.0:
            return "it adds its residual or rescales its output itself"
        if attn.added_kv_proj_dim is not None or attn.inner_kv_dim != attn.inner_dim:
            return "it has added projections or fewer key heads than query heads"
        if layer.kind == "attn1" and attn.is_cross_attention:
            return "it is a cross-attention in this block"
        return None
