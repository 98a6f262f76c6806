"""Keys and values of downsampled hidden states."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .kv_downsample import kv_downsample


def pooled_kv_projection(
    x: Tensor,
    grid: tuple[int, int],
    factor: tuple[int, int],
    alpha: float | Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_k: Tensor | None = None,
    b_v: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x (B, N, C) pooled, then projected by w_k (inner_k, C) and w_v (inner_v, C)."""
    pooled = kv_downsample(x, grid, factor, alpha)
    assert isinstance(pooled, Tensor)
    return F.linear(pooled, w_k, b_k), F.linear(pooled, w_v, b_v)
