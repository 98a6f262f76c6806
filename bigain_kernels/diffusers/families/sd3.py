"""Stable Diffusion 3 and 3.5: text behind the image, no rotation."""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch import Tensor

from ..attention import CompressedAttention, refuse_mask
from ..context import Context
from ..hooks import Signature
from .joint import JointFamily
from .layout import of_latent, steps_of_sigma


class CompressedSD3AttnProcessor(CompressedAttention, JointAttnProcessor2_0):
    """Attention of a Stable Diffusion 3 block: (B, N, C) to (B, N, C).

    Serves `attn`, which gets the text apart and returns it apart, and the `attn2` of blocks with dual attention, which
    sees the image alone.
    """

    text_first: ClassVar[bool] = False

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        bigain: Context | None = None,
    ) -> Any:
        step = self.step(attn, bigain, hidden_states)
        # The processor that this stands in for does not look at its mask.
        refuse_mask(attention_mask)
        if step is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states)
        x, words = self.run(step, attn, hidden_states, text=encoder_hidden_states)
        image = step.leave(self.output(attn, x))
        if words is None:
            return image
        return image, words if attn.context_pre_only else self.output_text(attn, words)


class SD3(JointFamily):
    """SD3Transformer2DModel: Stable Diffusion 3 and 3.5."""

    model = SD3Transformer2DModel
    signature = Signature(hidden_states=0, timestep=3, joint_attention_kwargs=5)
    place = of_latent
    told = steps_of_sigma
    block = Signature(hidden_states=0, joint_attention_kwargs=3)
    processors = (CompressedSD3AttnProcessor,)
    # FusedJointAttnProcessor2_0 is not among them: it leaves out the norm of queries and keys.
    replaceable = (JointAttnProcessor2_0,)
