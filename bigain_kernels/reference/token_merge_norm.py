"""Merging the tokens of a LayerNorm by a plan."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..plan import MergePlan
from .laplacian_score import compute_dtype
from .segments import segment_mean


def _layer_norm(
    values: Tensor,
    eps: float,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    """LayerNorm over the channels of (B, N, C) values, then adaLN: (1 + scale) * normalized + shift."""
    weight, bias = (None if t is None else t.to(values.dtype) for t in (norm_weight, norm_bias))
    values = F.layer_norm(values, values.shape[-1:], weight, bias, eps)
    if scale is not None and shift is not None:
        values = (1 + scale.to(values.dtype)[:, None]) * values + shift.to(values.dtype)[:, None]
    return values


def token_merge_norm(
    x: Tensor,
    plan: MergePlan,
    weights: Tensor | None,
    norm_eps: float,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    """The mean of LayerNorm(x), (B, N, C) tokens to (B, M, C) slots; see the public `token_merge`."""
    values = _layer_norm(x.to(compute_dtype(x)), norm_eps, norm_weight, norm_bias, scale, shift)
    return segment_mean(values, plan, weights).to(x.dtype)
