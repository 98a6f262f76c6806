"""Attention processors that pool the keys and values of image tokens in joint attention; text tokens stay whole.

Flux and Qwen-Image put text in front of the image and rotate both; Stable Diffusion 3 puts it behind and rotates
nothing. All may normalise queries and keys. The processors derive from those they stand in for: they are rebuilt
without arguments as those are, hold the attention backend where `set_attention_backend` puts it, and leave a call that
is not compressed to them. What to do hangs on the attention module as `attn._bigain`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    apply_rotary_emb_qwen,
)
from torch import Tensor

from .context import Context
from .processors import attend_by_op, enter, refuse_mask
from .projections import Window, pool_tokens, pools_early, project_pooled

Rotation = tuple[Tensor, Tensor]


def _is_native(backend: Any) -> bool:
    """Whether a processor's attention backend, or the one in force where it has none, is PyTorch's own choice."""
    chosen = _AttentionBackendRegistry.get_active_backend()[0] if backend is None else backend
    return chosen == AttentionBackendName.NATIVE


def nearest_rotation(rotation: Rotation, image_tokens: Window, grid: Window, factor: Window) -> Rotation:
    """The rotation of pooled keys: that of each window's nearest token; all others keep theirs.

    Args:
        rotation: cos and sin, each (T, d) float32.
        image_tokens: (start, stop) of the image among the T tokens.
        grid, factor: see `kv_downsample`, whose alpha = 1 picks exactly these rows.
    """
    cos, sin = pool_tokens((rotation[0][None], rotation[1][None]), image_tokens, grid, factor, 1.0)
    return cos[0], sin[0]


def _nearest_turns(turns: Tensor, image_tokens: Window, grid: Window, factor: Window) -> Tensor:
    """As `nearest_rotation`, of rotations (T, d / 2) as complex numbers."""
    (parts,) = pool_tokens((torch.view_as_real(turns).flatten(1)[None],), image_tokens, grid, factor, 1.0)
    return torch.view_as_complex(parts[0].unflatten(1, (-1, 2)))


class _Dispatching:
    """Attention by the backend that was chosen for the model."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention over keys as they are; all tensors (B, tokens, heads, d)."""
        return dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )

    def attend_to_pooled(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        image_tokens: Window,
        grid: Window,
        factor: Window,
        alpha: float | Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attention over keys and values that this pools first. The mask is one for the pooled keys."""
        if mask is None and _is_native(self._attention_backend):
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
            return attend_by_op(query, key, value, grid, factor, alpha, image_tokens=image_tokens).transpose(1, 2)
        size = key.shape[-1]
        pooled = pool_tokens((key.flatten(2), value.flatten(2)), image_tokens, grid, factor, alpha)
        key, value = (x.unflatten(-1, (-1, size)) for x in pooled)
        return self.attend(query, key, value, mask)


class FluxPoolAttnProcessor(_Dispatching, FluxAttnProcessor):
    """Attention of a Flux block over pooled keys and values of the image: (B, tokens, C) to (B, tokens, C).

    Serves the blocks of two streams, which give the text apart and get it back apart, and those of one stream, whose
    hidden states hold the text in front of the image. Tokens behind the image, such as those of a reference picture,
    stay whole like text. Source: BiGain, arXiv 2603.12240.
    """

    fused: ClassVar[bool] = False

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotation | None = None,
        bigain: Context | None = None,
    ) -> Any:
        layer, context = enter(attn, bigain)
        config = layer.config
        if not context["active"] or config.factor == (1, 1):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        refuse_mask(attention_mask)
        grid, factor, window = context["grid"], config.factor, context["image_tokens"]
        alpha = context.get("alpha", config.alpha)
        text = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        early = pools_early(attn, config, attn.fused_projections)
        if early:
            # The window counts in the joint sequence; a block of two streams has the text elsewhere.
            inside = (window[0] - text, window[1] - text)
            states = project_pooled(attn, hidden_states, grid, factor, alpha, attn.fused_projections, inside)
        elif attn.fused_projections:
            states = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            states = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        # Some heads only, under tensor parallelism: their size is what is fixed.
        query, key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in states)
        query, key = attn.norm_q(query), attn.norm_k(key)
        if encoder_hidden_states is not None:
            added = self._added(attn, encoder_hidden_states)
            query, key, value = (torch.cat([a, x], dim=1) for a, x in zip(added, (query, key, value), strict=True))
        if image_rotary_emb is not None:
            turns = nearest_rotation(image_rotary_emb, window, grid, factor) if early else image_rotary_emb
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, turns, sequence_dim=1)
        if early:
            x = self.attend(query, key, value)
        else:
            x = self.attend_to_pooled(query, key, value, window, grid, factor, alpha)
        x = x.flatten(2).to(query.dtype)
        if encoder_hidden_states is None:
            return x
        added_x, x = x[:, :text], x[:, text:]
        return attn.to_out[1](attn.to_out[0](x.contiguous())), attn.to_add_out(added_x.contiguous())

    @staticmethod
    def _added(attn: FluxAttention, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the text, each (B, text, heads, d)."""
        if attn.fused_projections:
            states = attn.to_added_qkv(text).chunk(3, dim=-1)
        else:
            states = attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)
        query, key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in states)
        return attn.norm_added_q(query), attn.norm_added_k(key), value


class QwenPoolAttnProcessor(_Dispatching, QwenDoubleStreamAttnProcessor2_0):
    """Attention of a Qwen-Image block over pooled keys and values of the image: both (B, tokens, C) to (B, tokens, C).

    Tokens of further pictures behind the first, those that Qwen-Image-Edit is given, stay whole like text. Source:
    BiGain, arXiv 2603.12240.
    """

    fused: ClassVar[bool] = False

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotation | None = None,
        bigain: Context | None = None,
    ) -> tuple[Tensor, Tensor]:
        layer, context = enter(attn, bigain)
        config, mask, words = layer.config, encoder_hidden_states_mask, encoder_hidden_states
        if not context["active"] or config.factor == (1, 1):
            return super().__call__(attn, hidden_states, words, mask, attention_mask, image_rotary_emb)
        refuse_mask(attention_mask)
        grid, factor, window = context["grid"], config.factor, context["image_tokens"]
        alpha = context.get("alpha", config.alpha)
        text = words.shape[1]
        inside = (window[0] - text, window[1] - text)
        early = pools_early(attn, config, False)
        if early:
            states = project_pooled(attn, hidden_states, grid, factor, alpha, image_tokens=inside)
        else:
            states = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = self._heads(attn, states, attn.norm_q, attn.norm_k)
        states = attn.add_q_proj(words), attn.add_k_proj(words), attn.add_v_proj(words)
        added_query, added_key, added_value = self._heads(attn, states, attn.norm_added_q, attn.norm_added_k)
        if image_rotary_emb is not None:
            turns, added_turns = image_rotary_emb
            query = apply_rotary_emb_qwen(query, turns, use_real=False)
            key = apply_rotary_emb_qwen(key, _nearest_turns(turns, inside, grid, factor) if early else turns, False)
            added_query, added_key = (apply_rotary_emb_qwen(x, added_turns, False) for x in (added_query, added_key))
        query = torch.cat([added_query, query], dim=1)
        key = torch.cat([added_key, key], dim=1)
        value = torch.cat([added_value, value], dim=1)
        if mask is not None:
            # Padding is masked among the words alone; of the image's keys all count, pooled or not.
            windows = (grid[0] // factor[0]) * (grid[1] // factor[1])
            images = hidden_states.shape[1] - grid[0] * grid[1] + windows
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], images)], dim=1)
            mask = mask[:, None, None, :]
        if early:
            x = self.attend(query, key, value, mask)
        else:
            x = self.attend_to_pooled(query, key, value, window, grid, factor, alpha, mask)
        x = x.flatten(2).to(query.dtype)
        image, words = x[:, text:].contiguous(), x[:, :text].contiguous()
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(words)

    @staticmethod
    def _heads(attn: Attention, states: tuple[Tensor, ...], norm_q: Any, norm_k: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as (B, tokens, heads, d), normalised where the layer does."""
        query, key, value = (x.unflatten(-1, (-1, attn.inner_dim // attn.heads)) for x in states)
        return query if norm_q is None else norm_q(query), key if norm_k is None else norm_k(key), value


class SD3PoolAttnProcessor(JointAttnProcessor2_0):
    """Attention of a Stable Diffusion 3 block over pooled keys and values of the image: (B, N, C) to (B, N, C).

    Serves `attn`, which gets the text apart and returns it apart, and the `attn2` of blocks with dual attention, which
    sees the image alone. Source: BiGain, arXiv 2603.12240.
    """

    fused: ClassVar[bool] = False

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        bigain: Context | None = None,
    ) -> Any:
        layer, context = enter(attn, bigain)
        config = layer.config
        # The processor that this stands in for does not look at its mask.
        refuse_mask(attention_mask)
        if not context["active"] or config.factor == (1, 1):
            return super().__call__(attn, hidden_states, encoder_hidden_states)
        grid, factor = context["grid"], config.factor
        alpha = context.get("alpha", config.alpha)
        early = pools_early(attn, config, False)
        if early:
            states = project_pooled(attn, hidden_states, grid, factor, alpha)
        else:
            states = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = self._heads(attn, states, attn.norm_q, attn.norm_k)
        if encoder_hidden_states is not None:
            text = encoder_hidden_states
            states = attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)
            added = self._heads(attn, states, attn.norm_added_q, attn.norm_added_k)
            query, key, value = (torch.cat([x, a], dim=2) for x, a in zip((query, key, value), added, strict=True))
        tokens = hidden_states.shape[1]
        if early:
            x = F.scaled_dot_product_attention(query, key, value)
        else:
            x = attend_by_op(query, key, value, grid, factor, alpha, image_tokens=(0, tokens))
        x = x.transpose(1, 2).flatten(2).to(query.dtype)
        image = attn.to_out[1](attn.to_out[0](x[:, :tokens]))
        if encoder_hidden_states is None:
            return image
        return image, x[:, tokens:] if attn.context_pre_only else attn.to_add_out(x[:, tokens:])

    @staticmethod
    def _heads(attn: Attention, states: tuple[Tensor, ...], norm_q: Any, norm_k: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as (B, heads, tokens, d), normalised where the layer does."""
        query, key, value = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in states)
        return query if norm_q is None else norm_q(query), key if norm_k is None else norm_k(key), value
