"""Attention processors that compress.

They are default-constructible, because diffusers rebuilds processors without arguments (loading an IP-Adapter does);
what to do hangs on the attention module as `attn._bigain`. The `Fused` variants stand in for FusedAttnProcessor2_0 and
use its fused projections. Layers are called as modules, so LoRA and quantized layers work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.hooks.layer_skip import AttentionProcessorSkipHook
from diffusers.models.attention_processor import Attention
from torch import Tensor

from ..ops import kv_downsample_attention, token_merge, token_unmerge
from ..plan import MergePlan
from .context import Context
from .planning import plan_of_call
from .projections import pools_early, project_pooled


@dataclass(frozen=True)
class LayerPatch:
    """What hangs on a compressed attention module.

    Attributes:
        config: of the compression, the MergeConfig or PoolConfig that the processor goes with.
        needs_source: tokens are matched on hidden states that the block's hook hands over (U-Net), not on the
            attention's own input (DiT).
    """

    config: Any
    needs_source: bool


def enter(attn: Any, context: Context | None) -> tuple[LayerPatch, Context]:
    """The patch of a layer and the context of the call, once the call is one that can be compressed."""
    layer = getattr(attn, "_bigain", None)
    if layer is None:
        raise RuntimeError(
            "token compression: this attention processor outlived remove_token_compression; "
            "set another one with set_attn_processor"
        )
    if context is None or "grid" not in context:
        raise RuntimeError(
            "token compression: the layer was called without the hooks of its model; call the model itself, not "
            "its forward method or its blocks, or use remove_token_compression"
        )
    if "pass" in context:
        context["pass"].reached = True
    if context["active"] and _is_perturbed(attn):
        context = {**context, "active": False}
    return layer, context


def _is_perturbed(attn: Any) -> bool:
    """Whether a guider of diffusers puts values in the place of attention for this call.

    It does so where PyTorch's attention is called with as many keys as queries, so the layer must run as it is.
    """
    registry = getattr(attn, "_diffusers_hook", None)
    return registry is not None and any(
        isinstance(hook, AttentionProcessorSkipHook) and hook.skip_attention_scores for hook in registry.hooks.values()
    )


def refuse_mask(attention_mask: Tensor | None) -> None:
    """ValueError on a mask over tokens that are merged or pooled."""
    if attention_mask is not None:
        raise ValueError(
            "attention_mask: got a mask, expected None: merged and pooled tokens have no place in the mask of the "
            "original ones; remove the mask or leave the layer out of the config"
        )


def _project(
    attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None, fused: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each (B, tokens, inner), the way diffusers' own processors make them."""
    if encoder_hidden_states is None:
        if fused:
            return attn.to_qkv(hidden_states).chunk(3, dim=-1)
        return attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
    if attn.norm_cross is not None:
        encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
    if fused:
        return attn.to_q(hidden_states), *attn.to_kv(encoder_hidden_states).chunk(2, dim=-1)
    return attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)


def _split(attn: Attention, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, tokens, heads * d) to (B, heads, tokens, d), normalised where the layer normalises queries and keys."""
    query, key, value = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value))
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    return query, key, value


def _output(attn: Attention, x: Tensor) -> Tensor:
    """(B, heads, tokens, d) through the output projection and its dropout."""
    return attn.to_out[1](attn.to_out[0](x.transpose(1, 2).flatten(2)))


def attend_by_op(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`kv_downsample_attention`, also under autocast: there a norm may leave queries and keys in float32, and PyTorch's
    attention makes them what the values are."""
    return kv_downsample_attention(query.to(value.dtype), key.to(value.dtype), value, *args, **kwargs)


def _attend(
    attn: Attention,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    fused: bool,
    mask: Tensor | None = None,
    plan: MergePlan | None = None,
) -> Tensor:
    """Attention over the tokens as they are: (B, tokens, C) to (B, tokens, C).

    The mask is diffusers' own, (B, 1 or tokens, keys), or one for each head.
    With a plan, each key of self-attention counts as often as the tokens it stands for: log(size) joins its scores.
    """
    query, key, value = _split(attn, *_project(attn, hidden_states, encoder_hidden_states, fused))
    if mask is not None:
        mask = attn.prepare_attention_mask(mask, key.shape[2], key.shape[0])
        mask = mask.unflatten(0, (key.shape[0], attn.heads))
    if plan is None or encoder_hidden_states is not None:
        return _output(attn, F.scaled_dot_product_attention(query, key, value, attn_mask=mask))
    bias = plan.sizes().to(torch.promote_types(query.dtype, torch.float32)).log()
    return _output(attn, attend_by_op(query, key, value, (1, plan.num_slots), 1, 1.0, key_bias=bias))


class MergeAttnProcessor:
    """Merges tokens, attends, and copies the results back to all tokens.

    attn1 and attn2 take norm's output (B, N, C) and return (B, N, C); with r merged tokens all projections and the
    attention itself see N - r. In attn2, and where keys other than its own tokens are given to attn1, only the queries
    are merged, and a mask over the keys stays what it is. Source of the scheme: Bolya and Hoffman 2023.
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
        layer, context = enter(attn, bigain)
        plan = None
        if context["active"]:
            source = context["source"] if layer.needs_source else hidden_states
            plan = plan_of_call(layer.config, context, source, getattr(attn, "bigain_block", None))
            if layer.needs_source:
                context["plan"] = plan
        if plan is None:
            return _attend(attn, hidden_states, encoder_hidden_states, self.fused, attention_mask)
        of_queries = attention_mask is not None and attention_mask.dim() == 3 and attention_mask.shape[1] != 1
        if encoder_hidden_states is None or of_queries:
            refuse_mask(attention_mask)
        merged = token_merge(hidden_states, plan, layer.config.mode)
        weighted = plan if layer.config.proportional else None
        merged = _attend(attn, merged, encoder_hidden_states, self.fused, attention_mask, weighted)
        return token_unmerge(merged, plan)


class PoolAttnProcessor:
    """Self-attention over pooled keys and values; queries keep full resolution: (B, N, C) to (B, N, C).

    Pooling weights sum to one, so it commutes with the projections, bias included. Separate projections pool the hidden
    states first and project s * s times less, in one op where they are plain linear layers. Fused projections make
    queries, keys and values in one call on all tokens, and a norm on keys does not commute: there, keys and values are
    pooled after projection and norm, unless the config pools hidden states. Source: BiGain, arXiv 2603.12240.

    Keys other than its own tokens (a reference picture's behind them, say) have no grid that we know: a call that gives
    such keys attends to them as they are.
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
        layer, context = enter(attn, bigain)
        config = layer.config
        if not context["active"] or config.factor == (1, 1) or encoder_hidden_states is not None:
            return _attend(attn, hidden_states, encoder_hidden_states, self.fused, attention_mask)
        refuse_mask(attention_mask)
        grid, alpha = context["grid"], context.get("alpha", config.alpha)
        if pools_early(attn, config, self.fused):
            query, key, value = project_pooled(attn, hidden_states, grid, config.factor, alpha, self.fused)
            return _output(attn, F.scaled_dot_product_attention(*_split(attn, query, key, value)))
        query, key, value = _split(attn, *_project(attn, hidden_states, None, self.fused))
        return _output(attn, attend_by_op(query, key, value, grid, config.factor, alpha))


class FusedMergeAttnProcessor(MergeAttnProcessor):
    """`MergeAttnProcessor` with the fused projections of `fuse_qkv_projections`."""

    fused: ClassVar[bool] = True


class FusedPoolAttnProcessor(PoolAttnProcessor):
    """`PoolAttnProcessor` with the fused projections of `fuse_qkv_projections`."""

    fused: ClassVar[bool] = True
