"""Flux: text in front of the image, in blocks of two streams and of one, both rotated by position."""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor, FluxSingleTransformerBlock
from torch import Tensor

from ..attention import Dispatching, refuse_mask
from ..context import Context
from ..hooks import Signature, WholeForm, Wholes
from ..steps import Rotation, States, turn_pairs
from .family import Layer
from .joint import JointFamily
from .layout import of_img_ids, sigma


class CompressedFluxAttnProcessor(Dispatching, FluxAttnProcessor):
    """Attention of a Flux block: (B, tokens, C) to (B, tokens, C).

    Serves the blocks of two streams, which give the text apart and get it back apart, and those of one stream, whose
    hidden states hold the text in front of the image. Tokens behind the image, such as those of a reference picture,
    stay whole like text.
    """

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        bigain: Context | None = None,
    ) -> Any:
        text = encoder_hidden_states
        step = self.step(attn, bigain, hidden_states, 0 if text is None else text.shape[1])
        if step is None:
            return super().__call__(attn, hidden_states, text, attention_mask, image_rotary_emb)
        refuse_mask(attention_mask)
        x, words = self.run(step, attn, hidden_states, text=text, rotation=image_rotary_emb)
        if words is None:
            return step.leave(x)
        return step.leave(self.output(attn, x.contiguous())), self.output_text(attn, words.contiguous())

    def uses_fused(self, attn: Any) -> bool:
        return attn.fused_projections

    def project(self, attn: Any, x: Tensor, keys: Tensor | None = None) -> States:
        return attn.to_qkv(x).chunk(3, dim=-1) if attn.fused_projections else super().project(attn, x, keys)

    def project_text(self, attn: Any, text: Tensor) -> States:
        return attn.to_added_qkv(text).chunk(3, dim=-1) if attn.fused_projections else super().project_text(attn, text)

    def turn(self, x: Tensor, rotation: Rotation) -> Tensor:
        cos, sin = rotation
        if cos.dim() == 2:
            return apply_rotary_emb(x, (cos, sin), sequence_dim=1)
        return turn_pairs(x, cos, sin)


class Flux(JointFamily):
    """FluxTransformer2DModel: Flux.1 dev, schnell, Fill, Kontext."""

    model = FluxTransformer2DModel
    signature = Signature(hidden_states=0, encoder_hidden_states=1, timestep=3, img_ids=4, joint_attention_kwargs=7)
    place = of_img_ids
    told = sigma
    processors = (CompressedFluxAttnProcessor,)
    replaceable = (FluxAttnProcessor,)
    attentions = (FluxAttention,)
    wholes: ClassVar[Wholes] = {FluxSingleTransformerBlock: WholeForm(has_text=False, returned=1)}

    def text_inside(self, layer: Layer) -> bool:
        return layer.attn.added_kv_proj_dim is None
