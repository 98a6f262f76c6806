"""Ops made of other ops, for backends that have no kernel of their own for them.

The functions take implementations by the names of their ops and return one. `attend` and `pool_image` are
the steps between, in PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..declaration import Tables
from ..tokens import share_mean
from .backend import Implementation
from .key_bias import attend_with_bias


def lgtm_plan(
    laplacian_score: Implementation,
    select_destinations: Implementation,
    bipartite_match: Implementation,
    merge_plan: Implementation,
) -> Implementation:
    """Score, destinations, matching and plan, one after another."""

    def run(x: Tensor, height: int, width: int, sy: int, sx: int, r: int, window: int, share: int) -> Tables:
        x = share_mean(x, share)
        destinations = select_destinations(laplacian_score(x, height, width, "l1"), height, width, sy, sx)
        similarity, match = bipartite_match(x, destinations, window, height, width, sy, sx)
        return merge_plan(similarity, match, destinations, r)

    return run


def _as_tokens(x: Tensor) -> Tensor:
    """(B, heads, N, d) as tokens: (B, N, heads * d) where that takes no copy, else (B * heads, N, d)."""
    if x.shape[1] == 1 or x.stride(1) == x.shape[3]:
        return x.transpose(1, 2).flatten(2)
    return x.flatten(0, 1)


def pool_heads(
    xs: Sequence[Tensor],
    height: int,
    width: int,
    sy: int,
    sx: int,
    alpha: float,
    row_alpha: Tensor | None,
    pool: Implementation,
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
        weights = row_alpha.repeat_interleave(heads) if split and row_alpha is not None else row_alpha
        for y in pool(rows, height, width, sy, sx, alpha, weights):
            pooled.append(y.unflatten(0, (batch, heads)) if split else y.unflatten(2, (heads, d)).transpose(1, 2))
    return pooled


def pool_image(
    xs: Sequence[Tensor],
    height: int,
    width: int,
    sy: int,
    sx: int,
    alpha: float,
    row_alpha: Tensor | None,
    image_start: int,
    image_stop: int,
    pool: Implementation,
) -> list[Tensor]:
    """Every x (B, heads, T, d) with its image tokens pooled and those in front and behind as they are."""
    if (sy, sx) == (1, 1):
        return list(xs)
    images = pool_heads([x[:, :, image_start:image_stop] for x in xs], height, width, sy, sx, alpha, row_alpha, pool)
    if image_stop - image_start == xs[0].shape[2]:
        return images
    return [torch.cat([x[:, :, :image_start], y, x[:, :, image_stop:]], dim=2) for x, y in zip(xs, images, strict=True)]


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, key_bias: Tensor | None) -> Tensor:
    """softmax(scale * q k^T + key_bias) v by PyTorch; memory of the result: (B, Nq, heads, d)."""
    if key_bias is None:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    else:
        out = attend_with_bias(q, k, v, key_bias, scale)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def kv_downsample_attention(kv_downsample: Implementation) -> Implementation:
    """Pooling, then PyTorch's attention."""

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        height: int,
        width: int,
        sy: int,
        sx: int,
        alpha: float,
        row_alpha: Tensor | None,
        scale: float | None,
        key_bias: Tensor | None,
        image_start: int,
        image_stop: int,
    ) -> Tensor:
        pooling = (height, width, sy, sx, alpha, row_alpha, image_start, image_stop)
        k, v = pool_image([k, v], *pooling, kv_downsample)
        return attend(q, k, v, scale, key_bias)

    return run


def pooled_kv_projection(kv_downsample: Implementation) -> Implementation:
    """Pooling, then PyTorch's linear layers."""

    def run(
        x: Tensor,
        height: int,
        width: int,
        sy: int,
        sx: int,
        alpha: float,
        row_alpha: Tensor | None,
        w_k: Tensor,
        w_v: Tensor,
        b_k: Tensor | None,
        b_v: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        (pooled,) = kv_downsample([x], height, width, sy, sx, alpha, row_alpha)
        return F.linear(pooled, w_k, b_k), F.linear(pooled, w_v, b_v)

    return run
