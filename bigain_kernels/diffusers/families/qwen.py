"""Qwen-Image: text with padding in front of the image, in blocks of two streams, both rotated by position."""

from __future__ import annotations

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    apply_rotary_emb_qwen,
)
from torch import Tensor

from ..attention import Dispatching, refuse_mask
from ..context import Context
from ..hooks import Signature
from ..steps import Rotation
from .joint import JointFamily
from .layout import of_img_shapes, sigma


class CompressedQwenAttnProcessor(Dispatching, QwenDoubleStreamAttnProcessor2_0):
    """Attention of a Qwen-Image block: image and text (B, tokens, C) to both again.

    Tokens of pictures that the model is given, as Qwen-Image-Edit is, stand behind those it draws and stay whole like
    text.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        bigain: Context | None = None,
    ) -> tuple[Tensor, Tensor]:
        text, mask = encoder_hidden_states, encoder_hidden_states_mask
        step = self.step(attn, bigain, hidden_states, text.shape[1])
        if step is None:
            return super().__call__(attn, hidden_states, text, mask, attention_mask, image_rotary_emb)
        refuse_mask(attention_mask)
        if mask is not None:
            # Padding is masked among the words alone; of the image's keys all count, pooled or not.
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], hidden_states.shape[1])], dim=1)
            mask = step.reduce_mask(mask[:, None, None, :])
        rotation = None if image_rotary_emb is None else torch.cat([image_rotary_emb[1], image_rotary_emb[0]])
        x, words = self.run(step, attn, hidden_states, text=text, rotation=rotation, mask=mask)
        assert words is not None
        return step.leave(self.output(attn, x.contiguous())), self.output_text(attn, words.contiguous())

    def turn(self, x: Tensor, rotation: Rotation) -> Tensor:
        assert isinstance(rotation, Tensor)
        if rotation.dim() == 2:
            return apply_rotary_emb_qwen(x, rotation, use_real=False)
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * rotation[:, :, None]).flatten(3).to(x.dtype)


class Qwen(JointFamily):
    """QwenImageTransformer2DModel: Qwen-Image, Qwen-Image-Edit and Qwen-Image-Layered."""

    model = QwenImageTransformer2DModel
    signature = Signature(hidden_states=0, encoder_hidden_states=1, timestep=3, img_shapes=4, attention_kwargs=6)
    place = of_img_shapes
    told = sigma
    block = Signature(hidden_states=0, joint_attention_kwargs=5)
    mlp = "img_mlp"
    processors = (CompressedQwenAttnProcessor,)
    replaceable = (QwenDoubleStreamAttnProcessor2_0,)
