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

    def reduce_mask(self, mask: Tensor) -> Tensor:
        """A mask (..., queries or 1, keys) over all tokens to that of the queries and keys that `attend` leaves."""
        return mask

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

    def leave(self, x: Tensor) -> Tensor:
        return token_unmerge(x, self.plan)


class MergeInsideStep(Step):
    """Queries, keys and values of the image are merged after norm and rotation, and the results copied back at once.

    It saves attention alone, in any family. Text stays whole.

    Args:
        plan: which tokens become one; a row for each frame.
        mode, weigh: see `MergeStep`.
        image_tokens: (start, stop) of the image among all tokens.
        frames: grids in it.
        own_keys: keys are those of the image; otherwise only queries are merged.
    """

    def __init__(
        self, plan: MergePlan, mode: str, weigh: bool, image_tokens: Window, frames: int, own_keys: bool
    ) -> None:
        self.plan, self.mode, self.weigh = plan, mode, weigh and own_keys
        self.image_tokens, self.frames, self.own_keys = image_tokens, frames, own_keys

    def attend(self, processor: Attending, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        merged = self._merge(query)
        if self.own_keys:
            key, value = self._merge(key), self._merge(value)
        if self.weigh and mask is None and processor.attends_natively():
            result = attend_by_op(merged, key, value, (1, key.shape[1]), 1, 1.0, key_bias=self._weights(merged))
        elif self.weigh:
            weights = self._weights(merged).to(merged.dtype)
            weights = weights.repeat(merged.shape[0] // weights.shape[0], 1)[:, None, None]
            mask = weights if mask is None else add_masks(weights, mask)
            result = processor.attend(merged, key, value, mask)
        else:
            result = processor.attend(merged, key, value, mask)
        return self._unmerge(result)

    def reduce_mask(self, mask: Tensor) -> Tensor:
        if self.own_keys:
            mask = self._pick(mask)
        if mask.shape[-2] != 1:
            mask = self._pick(mask.transpose(-1, -2)).transpose(-1, -2)
        return mask

    def _around(self, x: Tensor, image: Tensor) -> Tensor:
        """`image` (B, tokens, C) in the place of the image's tokens in x."""
        start, stop = self.image_tokens
        if (start, stop) == (0, x.shape[1]):
            return image
        return torch.cat([x[:, :start], image, x[:, stop:]], dim=1)

    def _merge(self, x: Tensor) -> Tensor:
        start, stop = self.image_tokens
        merged = token_merge(fold(x[:, start:stop].flatten(2), self.frames), self.plan, self.mode)
        return self._around(x, unfold(merged, self.frames).unflatten(2, x.shape[2:]))

    def _unmerge(self, x: Tensor) -> Tensor:
        start, slots = self.image_tokens[0], self.frames * self.plan.num_slots
        image = token_unmerge(fold(x[:, start : start + slots].flatten(2), self.frames), self.plan)
        image = unfold(image, self.frames).unflatten(2, x.shape[2:])
        if (start, start + slots) == (0, x.shape[1]):
            return image
        return torch.cat([x[:, :start], image, x[:, start + slots :]], dim=1)

    def _weights(self, merged: Tensor) -> Tensor:
        """log(size) of each key, (P, keys), 0 of text."""
        sizes = self.plan.sizes().to(torch.promote_types(merged.dtype, torch.float32)).log()
        sizes = unfold(sizes[..., None], self.frames)[..., 0]
        start = self.image_tokens[0]
        behind = merged.shape[1] - start - sizes.shape[1]
        return torch.nn.functional.pad(sizes, (start, behind))

    def _pick(self, mask: Tensor) -> Tensor:
        """The columns of a mask (B or 1, ..., tokens) of the tokens that are left: anchors stand for the image's."""
        start, stop = self.image_tokens
        tokens = torch.arange(self.frames, device=mask.device, dtype=torch.int64)[:, None] * self.plan.num_tokens
        anchors = self.plan.anchor.long().unflatten(0, (-1, self.frames)) + tokens + start
        rows = anchors.flatten(1)
        lead = rows.shape[0]
        before = torch.arange(start, device=mask.device).expand(lead, -1)
        after = torch.arange(stop, mask.shape[-1], device=mask.device).expand(lead, -1)
        index = torch.cat([before, rows, after], dim=1)
        batch = max(mask.shape[0], lead)
        index = index.repeat(batch // lead, 1).view(batch, *[1] * (mask.dim() - 2), -1)
        mask = mask.expand(batch, *mask.shape[1:])
        return mask.gather(-1, index.expand(*mask.shape[:-1], -1))


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
        frames: grids among the image's tokens.
    """

    def __init__(
        self,
        grid: Window,
        factor: Window,
        alpha: float | Tensor,
        image_tokens: Window,
        inside: Window,
        early: bool,
        frames: int = 1,
    ) -> None:
        self.grid, self.factor, self.alpha = grid, factor, alpha
        self.image_tokens, self.inside, self.early, self.frames = image_tokens, inside, early, frames

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
        # The op pools one grid.
        if mask is None and self.frames == 1 and processor.attends_natively():
            return attend_by_op(query, key, value, self.grid, self.factor, self.alpha, image_tokens=self.image_tokens)
        heads = key.shape[2]
        pooled = self._pool(self.alpha, key.flatten(2), value.flatten(2))
        key, value = (x.unflatten(-1, (heads, -1)) for x in pooled)
        return processor.attend(query, key, value, mask)

    def reduce_mask(self, mask: Tensor) -> Tensor:
        """A pooled key is seen where the nearest token of its window is."""
        rows = mask.flatten(0, -2)[..., None]
        (pooled,) = self._pool(1.0, rows.to(torch.promote_types(mask.dtype, torch.float16)))
        return pooled[..., 0].to(mask.dtype).view(*mask.shape[:-1], -1)

    def _pool(self, alpha: float | Tensor, *xs: Tensor) -> tuple[Tensor, ...]:
        return pool_tokens(xs, self.image_tokens, self.grid, self.factor, alpha, self.frames)


def attend_by_op(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`kv_downsample_attention` of (B, tokens, heads, d), also under autocast: there a norm may leave queries and keys
    in float32, and PyTorch's attention makes them what the values are."""
    query, key, value = (x.to(value.dtype).transpose(1, 2) for x in (query, key, value))
    return kv_downsample_attention(query, key, value, *args, **kwargs).transpose(1, 2)


def add_masks(weights: Tensor, mask: Tensor) -> Tensor:
    """Additive weights and a mask, additive or boolean (True is seen), as one additive mask."""
    if mask.dtype == torch.bool:
        return weights.masked_fill(~mask, -torch.inf)
    return weights + mask


def fold(x: Tensor, frames: int) -> Tensor:
    """(B, frames * N, C) to (B * frames, N, C): each frame a row of its own."""
    return x if frames == 1 else x.unflatten(1, (frames, -1)).flatten(0, 1)


def unfold(x: Tensor, frames: int) -> Tensor:
    """The inverse of `fold`."""
    return x if frames == 1 else x.unflatten(0, (-1, frames)).flatten(1, 2)
