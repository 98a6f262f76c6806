"""One attention for all families, with a compressing step around it.

Processors are default-constructible, because diffusers rebuilds them without arguments (loading an IP-Adapter does);
what to do hangs on the attention module as `attn._bigain`. Layers are called as modules, so LoRA and quantized layers
work. A family derives a processor from `CompressedAttention` and, where a call that is not compressed should run as
before, from the one that it stands in for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.hooks.layer_skip import AttentionProcessorSkipHook
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,  # nothing public says which backend is in force
    dispatch_attention_fn,
)
from torch import Tensor

from ..methods import CompressionConfig, MergeConfig, PoolConfig
from .context import Context, for_rows, of_part
from .planning import plan_of_call, planned
from .projections import pools_early
from .steps import MergeInsideStep, MergeStep, PoolStep, Rotation, States, Step, fold


def active_backend() -> AttentionBackendName:
    """The attention backend of models that have none of their own."""
    return _AttentionBackendRegistry.get_active_backend()[0]


@dataclass(frozen=True)
class LayerPatch:
    """What hangs on a compressed attention module.

    Attributes:
        config: of the compression.
        merge: "hidden" or "attention", where tokens are merged.
        needs_source: tokens are matched on hidden states that a hook of the block hands over (U-Net), not on the
            attention's own input (DiT).
        level: its resolution level.
        part: the place of `config` in a `MixedConfig`.
        has_text: of an MLP, that its tokens are those of attention, text among them.
    """

    config: CompressionConfig
    merge: str
    needs_source: bool
    level: int
    part: int = 0
    has_text: bool = False


def is_perturbed(attn: Any) -> bool:
    """Whether a guider of diffusers puts values in the place of attention for this call.

    It does so where PyTorch's attention is called with as many keys as queries, so the layer must run as it is.
    """
    registry = getattr(attn, "_diffusers_hook", None)
    return registry is not None and any(
        isinstance(hook, AttentionProcessorSkipHook) and hook.skip_attention_scores for hook in registry.hooks.values()
    )


def _enter(attn: Any, context: Context | None) -> tuple[LayerPatch, Context]:
    """The patch of a layer and the context of the call, once the call is one that can be compressed."""
    layer = getattr(attn, "_bigain", None)
    if layer is None:
        raise RuntimeError(
            "token compression: this attention processor outlived remove_token_compression; "
            "set another one with set_attn_processor"
        )
    if not isinstance(context, Context):
        raise RuntimeError(
            "token compression: the layer was called without the hooks of its model; call the model itself, not "
            "its forward method or its blocks, or use remove_token_compression"
        )
    if context.forward.watched is not None:
        context.forward.watched.reached = True
    return layer, of_part(context, layer.part)


def refuse_mask(attention_mask: Tensor | None) -> None:
    """ValueError on a mask over tokens that are merged or pooled."""
    if attention_mask is not None:
        raise ValueError(
            "attention_mask: got a mask, expected None: merged and pooled tokens have no place in the mask of the "
            "original ones; remove the mask or leave the layer out of the config"
        )


class CompressedAttention:
    """An attention of a family, whatever the step: (B, tokens, C) to (B, tokens, C).

    Tensors between projection and output are (B, tokens, heads, d). A family says how its layers make them, where text
    stands, how they are turned, and what becomes of the result.

    Attributes:
        text_first: text stands in front of the image in joint attention; otherwise behind it.
    """

    text_first: ClassVar[bool] = True

    def uses_fused(self, attn: Any) -> bool:
        """Whether queries, keys and values of this layer come from one projection."""
        return False

    def project(self, attn: Any, x: Tensor, keys: Tensor | None = None) -> States:
        """Queries of x, and keys and values of x or of `keys`, each (B, tokens, inner)."""
        keys = x if keys is None else keys
        return attn.to_q(x), attn.to_k(keys), attn.to_v(keys)

    def project_text(self, attn: Any, text: Tensor) -> States:
        """The same of the text of a block with two streams."""
        return attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)

    def heads(self, attn: Any, states: States, norm_q: Any, norm_k: Any) -> States:
        """(B, tokens, heads * d) to (B, tokens, heads, d), queries and keys normalised where the layer does."""
        # Some heads only, under tensor parallelism: their size is what is fixed.
        query, key, value = (x.unflatten(-1, (-1, attn.inner_dim // attn.heads)) for x in states)
        return query if norm_q is None else norm_q(query), key if norm_k is None else norm_k(key), value

    def turn(self, x: Tensor, rotation: Rotation) -> Tensor:
        """Queries or keys, turned by position: by a table for all rows of the batch, or one for each."""
        raise NotImplementedError(f"{type(self).__name__}.turn")

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention over keys as they are."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)

    def attends_natively(self) -> bool:
        """Whether `attend` is PyTorch's attention, for which an op of ours may stand in."""
        return True

    def output(self, attn: Any, x: Tensor) -> Tensor:
        """(B, tokens, inner) of the image through the output projection and its dropout."""
        return attn.to_out[1](attn.to_out[0](x))

    def output_text(self, attn: Any, x: Tensor) -> Tensor:
        """The same of the text of a block with two streams."""
        return attn.to_add_out(x)

    def step(self, attn: Any, context: Context | None, x: Tensor, text: int = 0, own_keys: bool = True) -> Step | None:
        """What compression does around this call; None where it leaves it alone.

        Args:
            attn: the attention.
            context: of the call.
            x: (B, N, C) hidden states.
            text: tokens of text that join the image's but are not among x.
            own_keys: keys are made of x; otherwise only queries can be merged, and there is no grid to pool on.
        """
        layer, context = _enter(attn, context)
        config, forward = layer.config, context.forward
        if not forward.active or is_perturbed(attn):
            return None
        if context.merged is not None:
            return context.merged
        start, stop = context.image_tokens
        if stop - start < config.min_tokens:
            return None
        inside = (start - text, stop - text) if self.text_first else (start, stop)
        if isinstance(config, MergeConfig):
            context, source = planned(config, context), x
            if layer.needs_source:
                if context.source is None:
                    raise RuntimeError("token compression: the layer was called without the hook of its block")
                source = context.source
            elif inside != (0, x.shape[1]):
                source = x[:, inside[0] : inside[1]]
            source = fold(source, context.frames)
            ratio = forward.ratio_at(layer.level)
            plan = plan_of_call(config, context, source, ratio, getattr(attn, "bigain_block", None))
            if plan is None:
                return None
            step = MergeStep if layer.merge == "hidden" else MergeInsideStep
            return step(plan, config.mode, config.proportional, (start, stop), inside, context.frames, own_keys)
        assert isinstance(config, PoolConfig)
        factor = config.factor_at(layer.level)
        if factor == (1, 1) or not own_keys:
            return None
        early = self.pools_early(attn, config)
        alpha = for_rows(forward.alpha, x.shape[0]) if isinstance(forward.alpha, Tensor) else forward.alpha
        return PoolStep(context.grid, factor, alpha, (start, stop), inside, early, context.frames)

    def pools_early(self, attn: Any, config: Any) -> bool:
        """Whether hidden states are pooled, not keys and values."""
        return pools_early(attn, config, self.uses_fused(attn))

    def run(
        self,
        step: Step,
        attn: Any,
        x: Tensor,
        *,
        text: Tensor | None = None,
        keys: Tensor | None = None,
        rotation: Rotation | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The attention with `step` around it.

        Args:
            step: what compression does.
            attn: the attention.
            x: (B, N, C) hidden states of the image; in blocks of one stream, text is among them.
            text: (B, L, C) text that joins it, in blocks of two streams.
            keys: (B, L, C) what keys and values are made of, in cross-attention.
            rotation: of all tokens that attend to each other.
            mask: (B, 1 or heads, 1 or tokens, keys), of the keys that the step leaves.

        Returns:
            Results of the image's tokens before the output projection, as many as the step left, and of the text.
        """
        query, key, value = self.heads(attn, step.project(self, attn, step.enter(x), keys), attn.norm_q, attn.norm_k)
        if text is not None:
            words = self.heads(attn, self.project_text(attn, text), attn.norm_added_q, attn.norm_added_k)
            query, key, value = (self._join(a, b) for a, b in zip((query, key, value), words, strict=True))
        if rotation is not None:
            turned = step.turned(rotation, query.shape[0])
            query, key = self.turn(query, turned), self.turn(key, step.of_keys(rotation, turned))
        result = step.attend(self, query, key, value, mask).flatten(2).to(query.dtype)
        if text is None:
            return result, None
        count = text.shape[1]
        if self.text_first:
            return result[:, count:], result[:, :count]
        return result[:, : result.shape[1] - count], result[:, result.shape[1] - count :]

    def _join(self, image: Tensor, text: Tensor) -> Tensor:
        return torch.cat([text, image] if self.text_first else [image, text], dim=1)


class Dispatching(CompressedAttention):
    """Attention by the backend that was chosen for the model by `set_attention_backend`, or for all."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        backend, parallel = self._attention_backend, self._parallel_config
        return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=backend, parallel_config=parallel)

    def attends_natively(self) -> bool:
        chosen = self._attention_backend
        return (active_backend() if chosen is None else chosen) == AttentionBackendName.NATIVE
