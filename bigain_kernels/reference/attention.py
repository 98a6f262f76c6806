"""Attention over downsampled keys and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .kv_downsample import kv_downsample
from .laplacian_score import compute_dtype


def _as_tokens(x: Tensor) -> Tensor:
    """(B, heads, N, d) as tokens: (B, N, heads * d) where that takes no copy, else (B * heads, N, d)."""
    if x.shape[1] == 1 or x.stride(1) == x.shape[3]:
        return x.transpose(1, 2).flatten(2)
    return x.flatten(0, 1)


def pool_heads(
    xs: Sequence[Tensor],
    grid: tuple[int, int],
    factor: tuple[int, int],
    alpha: float | Tensor,
    pool: Callable[..., Any],
) -> list[Tensor]:
    """Every x (B, heads, N, d) pooled to (B, heads, (H // sy) * (W // sx), d) by `pool`, a `kv_downsample`.

    The views that attention is given, a projection split into heads or one tensor per head, are read where they lie.
    Tensors of one layout take one call of `pool`.
    """
    batch, heads, _, d = xs[0].shape
    tokens = [_as_tokens(x) for x in xs]
    calls = [tokens] if len({rows.shape for rows in tokens}) == 1 else [[rows] for rows in tokens]
    pooled = []
    for rows in calls:
        split = rows[0].shape[2] != heads * d
        weight = alpha.repeat_interleave(heads) if split and isinstance(alpha, Tensor) else alpha
        for y in pool(rows, grid, factor, weight):
            pooled.append(y.unflatten(0, (batch, heads)) if split else y.unflatten(2, (heads, d)).transpose(1, 2))
    return pooled


def pool_image(
    xs: Sequence[Tensor],
    grid: tuple[int, int],
    factor: tuple[int, int],
    alpha: float | Tensor,
    image_tokens: tuple[int, int],
    pool: Callable[..., Any],
) -> list[Tensor]:
    """Every x (B, heads, T, d) with its image tokens pooled and those in front and behind as they are."""
    start, stop = image_tokens
    if factor == (1, 1):
        return list(xs)
    images = pool_heads([x[:, :, start:stop] for x in xs], grid, factor, alpha, pool)
    if stop - start == xs[0].shape[2]:
        return images
    return [torch.cat([x[:, :, :start], y, x[:, :, stop:]], dim=2) for x, y in zip(xs, images, strict=True)]


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, key_bias: Tensor | None) -> Tensor:
    """softmax(scale * q k^T + key_bias) v; memory of the result: (B, Nq, heads, d)."""
    if key_bias is None:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    else:
        # Biases count in their own precision: log(5) in bfloat16 would be off by 0.2 %, and so would every weight.
        wide = compute_dtype(q)
        mask = key_bias.to(wide).repeat(q.shape[0] // max(key_bias.shape[0], 1), 1)[:, None, None, :]
        x = F.scaled_dot_product_attention(q.to(wide), k.to(wide), v.to(wide), attn_mask=mask, scale=scale)
        out = x.to(q.dtype)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def kv_downsample_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    factor: tuple[int, int],
    alpha: float | Tensor,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    image_tokens: tuple[int, int] | None = None,
    pool: Callable[..., Any] = kv_downsample,
) -> Tensor:
    """softmax(scale * q k'^T + key_bias) v' with k', v' the pooled k, v; (B, heads, Nq, d)."""
    image = image_tokens or (0, k.shape[2])
    k, v = pool_image([k, v], grid, factor, alpha, image, pool)
    return attend(q, k, v, scale, key_bias)
