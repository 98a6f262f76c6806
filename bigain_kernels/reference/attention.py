"""Attention over downsampled keys and values."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .kv_downsample import kv_downsample


def kv_downsample_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    factor: tuple[int, int],
    alpha: float | Tensor,
    scale: float | None = None,
    key_bias: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q k'^T + key_bias) v' with k', v' the pooled k, v; (B, heads, N, d)."""
    batch, heads, n, d = k.shape
    rows = [tensor.transpose(1, 2).reshape(batch, n, heads * d) for tensor in (k, v)]
    pooled = [row.unflatten(2, (heads, d)).transpose(1, 2) for row in kv_downsample(rows, grid, factor, alpha)]
    mask = None if key_bias is None else key_bias.to(q.dtype)[:, None, None, :]
    return F.scaled_dot_product_attention(q, pooled[0], pooled[1], attn_mask=mask, scale=scale)
