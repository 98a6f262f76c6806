"""What compression does around one call of an attention: nothing, merge its tokens, or pool its keys and values.

A step is made for the call and knows its numbers; `attention.py` knows where in an attention each of its parts stands.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ..ops import kv_downsample_attention, token_merge, token_unmerge
from ..plan import MergePlan
from .projections import Window, pool_tokens, project_pooled

# cos and sin, each (T, d); or rotations (T, d / 2) as complex numbers.
Rotation = tuple[Tensor, Tensor] | Tensor
States = tuple[Tensor, Tensor, Tensor]


class Attending(Protocol):
    """What a step asks of the attention processor that it runs in; see `attention.CompressedAttention`."""

    def uses_fused(self, attn: Any) -> bool: ...
    def project(self, attn: Any, x: Tensor, keys: Tensor | None) -> States: ...
    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor: ...
    def attends_natively(self) -> bool: ...


class Step:
    """Attention over the tokens as they are; the base of the others."""

    def enter(self, x: Tensor) -> Tensor:
        """Hidden states (B, N, C) of the image to those that are projected."""
        return x

    def project(self, processor: Attending, attn: Any, x: Tensor, keys: Tensor | None) -> States:
        """Queries, keys and values, each (B, tokens, inner), of hidden states, or keys and values of `keys`."""
        return processor.project(attn, x, keys)

    def of_keys(self, rotation: Rotation) -> Rotation:
        """The rotation of the keys, from that of all tokens."""
        return rotation

    def attend(self, processor: Attending, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attention; all tensors (B, tokens, heads, d)."""
        return processor.attend(query, key, value, mask)

    def keys_of(self, tokens: int) -> int:
        """How many keys are left of so many hidden states of the image and what stands behind it."""
        return tokens

    def leave(self, x: Tensor) -> Tensor:
        """The image's result (B, tokens, C) to all its tokens."""
        return x


class MergeStep(Step):
    """Tokens are merged before the projections and copied back behind the output: all between sees N - r of them.

    Source of the scheme: Bolya and Hoffman 2023.

    Args:
        plan: which tokens become one.
        mode: see `token_merge`.
        weigh: each key counts as often as the tokens it stands for: log(size) joins its scores.
    """

    def __init__(self, plan: MergePlan, mode: str, weigh: bool) -> None:
        self.plan, self.mode, self.weigh = plan, mode, weigh

    def enter(self, x: Tensor) -> Tensor:
        return token_merge(x, self.plan, self.mode)

    def attend(self, processor: Attending, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if not self.weigh:
            return processor.attend(query, key, value, mask)
        bias = self.plan.sizes().to(torch.promote_types(query.dtype, torch.float32)).log()
        return attend_by_op(query, key, value, (1, self.plan.num_slots), 1, 1.0, key_bias=bias)

    def keys_of(self, tokens: int) -> int:
        return tokens - self.plan.r

    def leave(self, x: Tensor) -> Tensor:
        return token_unmerge(x, self.plan)


class PoolStep(Step):
    """Queries keep full resolution; keys and values of the image are pooled. Source: BiGain, arXiv 2603.12240.

    Pooling weights sum to one, so it commutes with the projections, bias included. Where nothing stands between that
    does not commute (a norm or a rotation of keys), or the config pools hidden states, `early` pools before them and
    projects s * s times less.

    Args:
        grid, factor, alpha: see `kv_downsample`.
        image_tokens: (start, stop) of the image among all keys.
        inside: the same among the hidden states, which in blocks of two streams hold no text.
        early: pool hidden states, not keys and values.
    """

    def __init__(
        self, grid: Window, factor: Window, alpha: float | Tensor, image_tokens: Window, inside: Window, early: bool
    ) -> None:
        self.grid, self.factor, self.alpha = grid, factor, alpha
        self.image_tokens, self.inside, self.early = image_tokens, inside, early

    def project(self, processor: Attending, attn: Any, x: Tensor, keys: Tensor | None) -> States:
        if not self.early:
            return processor.project(attn, x, keys)
        fused = processor.uses_fused(attn)
        return project_pooled(attn, x, self.grid, self.factor, self.alpha, fused, self.inside)

    def of_keys(self, rotation: Rotation) -> Rotation:
        """Of keys that were pooled before it: that of each window's nearest token, which alpha = 1 picks."""
        if not self.early:
            return rotation
        if isinstance(rotation, tuple):
            cos, sin = self._pool(1.0, rotation[0][None], rotation[1][None])
            return cos[0], sin[0]
        (parts,) = self._pool(1.0, torch.view_as_real(rotation).flatten(1)[None])
        return torch.view_as_complex(parts[0].unflatten(1, (-1, 2)))

    def attend(self, processor: Attending, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if self.early:
            return processor.attend(query, key, value, mask)
        if mask is None and processor.attends_natively():
            return attend_by_op(query, key, value, self.grid, self.factor, self.alpha, image_tokens=self.image_tokens)
        heads = key.shape[2]
        pooled = self._pool(self.alpha, key.flatten(2), value.flatten(2))
        key, value = (x.unflatten(-1, (heads, -1)) for x in pooled)
        return processor.attend(query, key, value, mask)

    def keys_of(self, tokens: int) -> int:
        (height, width), (sy, sx) = self.grid, self.factor
        return tokens - height * width + (height // sy) * (width // sx)

    def _pool(self, alpha: float | Tensor, *xs: Tensor) -> tuple[Tensor, ...]:
        return pool_tokens(xs, self.image_tokens, self.grid, self.factor, alpha)


def attend_by_op(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`kv_downsample_attention` of (B, tokens, heads, d), also under autocast: there a norm may leave queries and keys
    in float32, and PyTorch's attention makes them what the values are."""
    query, key, value = (x.to(value.dtype).transpose(1, 2) for x in (query, key, value))
    return kv_downsample_attention(query, key, value, *args, **kwargs).transpose(1, 2)
