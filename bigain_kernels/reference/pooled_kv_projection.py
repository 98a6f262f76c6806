"""Keys and values of downsampled hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    pool: Callable[..., Any] = kv_downsample,
) -> tuple[Tensor, Tensor]:
    """x (B, N, C) pooled, then projected by w_k (inner_k, C) and w_v (inner_v, C)."""
    pooled = pool(x, grid, factor, alpha)
    return F.linear(pooled, w_k, b_k), F.linear(pooled, w_v, b_v)
