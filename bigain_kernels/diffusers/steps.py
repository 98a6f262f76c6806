"""What compression does around one call of an attention: nothing, merge its tokens, or pool its keys and values.

A step is made for the call and knows its numbers; `attention.py` knows where in an attention each of its parts stands.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ..attention import needs_derivative
from ..backends.key_bias import attend_with_bias
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

    def turned(self, rotation: Rotation, rows: int) -> Rotation:
        """The rotation of the queries, from that of all tokens, for a batch of so many rows.

        Tables become (B, T, ...) where rows differ.
        """
        return rotation

    def of_keys(self, rotation: Rotation, turned: Rotation) -> Rotation:
        """The rotation of the keys, from that of all tokens and that of the queries."""
        return turned

    def attend(self, processor: Attending, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attention; all tensors (B, tokens, heads, d)."""
        return processor.attend(query, key, value, mask)

    def reduce_mask(self, mask: Tensor) -> Tensor:
        """A mask (..., queries or 1, keys) over all tokens to that of the queries and keys that `attend` leaves."""
        return mask

    def leave(self, x: Tensor) -> Tensor:
        """The image's result (B, tokens, C) to all its tokens."""
        return x


class Merging(Step):
    """What both ways of merging tokens share.

    Args:
        plan: which tokens of the image become one; a row for each frame.
        mode: see `token_merge`.
        weigh: each key counts as often as the tokens it stands for: log(size) joins its scores.
        image_tokens: (start, stop) of the image among all tokens that attend to each other.
        inside: the same among the hidden states, which in blocks of two streams hold no text.
        frames: grids in it.
        own_keys: keys are those of the image and of text that joins it; otherwise only queries are merged.
    """

    def __init__(
        self,
        plan: MergePlan,
        mode: str,
        weigh: bool,
        image_tokens: Window,
        inside: Window,
        frames: int = 1,
        own_keys: bool = True,
    ) -> None:
        self.plan, self.mode, self.weigh = plan, mode, weigh and own_keys
        self.image_tokens, self.inside, self.frames, self.own_keys = image_tokens, inside, frames, own_keys

    def reduce_mask(self, mask: Tensor) -> Tensor:
        if self.own_keys:
            mask = self._pick(mask)
        if mask.shape[-2] != 1:
            mask = self._pick(mask.transpose(-1, -2)).transpose(-1, -2)
        return mask

    def _attend(self, processor: Attending, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attention over what is left, weighed or not."""
        if not self.weigh:
            return processor.attend(query, key, value, mask)
        if mask is None and processor.attends_natively():
            if needs_derivative(query, key, value):  # the op's would attend twice
                q, k, v = (x.to(value.dtype).transpose(1, 2) for x in (query, key, value))
                # Autocast would round the weights to the 16 bits of the queries.
                with torch.autocast(q.device.type, enabled=False):
                    return attend_with_bias(q, k, v, self._weights(key)).transpose(1, 2)
            return attend_by_op(query, key, value, (1, key.shape[1]), 1, 1.0, key_bias=self._weights(key))
        weights = self._weights(key).to(query.dtype)
        weights = weights.repeat(query.shape[0] // weights.shape[0], 1)[:, None, None]
        return processor.attend(query, key, value, weights if mask is None else add_masks(weights, mask))

    def _merge(self, x: Tensor, window: Window) -> Tensor:
        """(B, T, C) with the tokens of the window merged."""
        start, stop = window
        image = unfold(token_merge(fold(x[:, start:stop], self.frames), self.plan, self.mode), self.frames)
        return image if stop - start == x.shape[1] else torch.cat([x[:, :start], image, x[:, stop:]], dim=1)

    def _unmerge(self, x: Tensor, start: int) -> Tensor:
        """The inverse: the slots that stand from `start` on become all the tokens that they stand for."""
        stop = start + self.frames * self.plan.num_slots
        image = unfold(token_unmerge(fold(x[:, start:stop], self.frames), self.plan), self.frames)
        return image if stop - start == x.shape[1] else torch.cat([x[:, :start], image, x[:, stop:]], dim=1)

    def _weights(self, key: Tensor) -> Tensor:
        """log(size) of each key (P, keys), 0 of text."""
        sizes = self.plan.sizes().to(torch.promote_types(key.dtype, torch.float32)).log()
        sizes = unfold(sizes[..., None], self.frames)[..., 0]
        start = self.image_tokens[0]
        return torch.nn.functional.pad(sizes, (start, key.shape[1] - start - sizes.shape[1]))

    def _left(self, tokens: int) -> Tensor:
        """Which of all tokens are left, (P, left) int64: of the image's, the anchor of each slot."""
        start, stop = self.image_tokens
        anchors = self.plan.anchor.long().unflatten(0, (-1, self.frames))
        first = torch.arange(self.frames, device=anchors.device)[:, None] * self.plan.num_tokens + start
        image = (anchors + first).flatten(1)
        before, after = (
            torch.arange(*ends, device=image.device).expand(image.shape[0], -1) for ends in ((0, start), (stop, tokens))
        )
        return torch.cat([before, image, after], dim=1)

    def _pick(self, mask: Tensor) -> Tensor:
        """The columns of a mask (B or 1, ..., tokens) of the tokens that are left."""
        left = self._left(mask.shape[-1])
        batch = max(mask.shape[0], left.shape[0])
        left = left.repeat(batch // left.shape[0], 1).view(batch, *[1] * (mask.dim() - 2), -1)
        mask = mask.expand(batch, *mask.shape[1:])
        return mask.gather(-1, left.expand(*mask.shape[:-1], -1))


class MergeStep(Merging):
    """Tokens are merged before the projections and copied back behind the output: all between sees fewer of them.

    A merged token is turned as its anchor is. Source of the scheme: Bolya and Hoffman 2023.
    """

    def enter(self, x: Tensor) -> Tensor:
        return self._merge(x, self.inside)

    def turned(self, rotation: Rotation, rows: int) -> Rotation:
        tables = rotation if isinstance(rotation, tuple) else (rotation,)
        left = self._left(tables[0].shape[0])
        if left.shape[0] == 1:
            picked = tuple(table[left[0]] for table in tables)
        else:
            picked = tuple(table[left].repeat(rows // left.shape[0], 1, 1) for table in tables)
        return (picked[0], picked[1]) if isinstance(rotation, tuple) else picked[0]

    def attend(self, processor: Attending, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return self._attend(processor, query, key, value, mask)

    def leave(self, x: Tensor) -> Tensor:
        return self._unmerge(x, self.inside[0])

    def restore(self, x: Tensor, few: Tensor, output: Tensor) -> Tensor:
        """What a block makes of x (B, tokens, C) that was merged to `few` in front of it: what it added, for all."""
        start, stop = self.inside
        slots = few.shape[1] - (x.shape[1] - stop + start)
        change = output[:, start : start + slots] - few[:, start : start + slots]
        image = token_unmerge(fold(change, self.frames), self.plan, fold(x[:, start:stop], self.frames))
        return torch.cat([output[:, :start], unfold(image, self.frames), output[:, start + slots :]], dim=1)


class MergedStep(MergeStep):
    """In a block whose tokens were merged in front of it: attention turns and weighs them, and no more."""

    def enter(self, x: Tensor) -> Tensor:
        return x

    def leave(self, x: Tensor) -> Tensor:
        return x


class MergeInsideStep(Merging):
    """Queries, keys and values of the image are merged after norm and rotation, and the results copied back at once.

    It saves attention alone, in any family. Text stays whole.
    """

    def attend(self, processor: Attending, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        merged = self._merge_heads(query)
        if self.own_keys:
            key, value = self._merge_heads(key), self._merge_heads(value)
        result = self._attend(processor, merged, key, value, mask)
        return self._unmerge(result.flatten(2), self.image_tokens[0]).unflatten(2, result.shape[2:])

    def _merge_heads(self, x: Tensor) -> Tensor:
        return self._merge(x.flatten(2), self.image_tokens).unflatten(2, x.shape[2:])


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
        return project_pooled(attn, x, self.grid, self.factor, self.alpha, fused, self.inside, self.frames)

    def of_keys(self, rotation: Rotation, turned: Rotation) -> Rotation:
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
        # The op pools one grid, and its derivative would attend twice.
        recorded = needs_derivative(query, key, value)
        if mask is None and self.frames == 1 and not recorded and processor.attends_natively():
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


def turn_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys (B, tokens, heads, d), each pair of neighbouring channels turned by a table (B, tokens, d)."""
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    across = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    return (x.float() * cos[:, :, None] + across * sin[:, :, None]).to(x.dtype)


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
