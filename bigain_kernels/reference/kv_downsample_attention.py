"""Attention over downsampled keys and values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .kv_downsample import kv_downsample
from .laplacian_score import compute_dtype


def pool_image(
    x: Tensor, grid: tuple[int, int], factor: tuple[int, int], alpha: float | Tensor, image_tokens: tuple[int, int]
) -> Tensor:
    """x (B, heads, T, d) with its image tokens pooled, head by head, and those in front and behind as they are."""
    if factor == (1, 1):
        return x
    batch, heads = x.shape[:2]
    start, stop = image_tokens
    weight = alpha.repeat_interleave(heads) if isinstance(alpha, Tensor) else alpha
    image = kv_downsample(x[:, :, start:stop].flatten(0, 1), grid, factor, weight)
    assert isinstance(image, Tensor)
    return torch.cat([x[:, :, :start], image.unflatten(0, (batch, heads)), x[:, :, stop:]], dim=2)


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
) -> Tensor:
    """softmax(scale * q k'^T + key_bias) v' with k', v' the pooled k, v; (B, heads, Nq, d)."""
    image = image_tokens or (0, k.shape[2])
    k, v = (pool_image(x, grid, factor, alpha, image) for x in (k, v))
    if key_bias is None:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    else:
        # Biases count in their own precision: log(5) in bfloat16 would be off by 0.2 %, and so would every weight.
        dtype = compute_dtype(q)
        mask = key_bias.to(dtype).repeat(q.shape[0] // max(key_bias.shape[0], 1), 1)[:, None, None, :]
        out = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), attn_mask=mask, scale=scale)
    return out.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)
