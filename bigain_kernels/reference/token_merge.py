"""Merging tokens by a plan."""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan import MergePlan
from .laplacian_score import compute_dtype
from .segments import rows_of, segment_mean
from .token_merge_norm import token_merge_norm


def _largest_norm(values: Tensor, plan: MergePlan) -> Tensor:
    """The largest L2 norm among the members of each slot; (B, M, 1)."""
    norm = values.square().sum(-1).sqrt()
    largest = norm.new_zeros(values.shape[0], plan.num_slots)
    return largest.scatter_reduce_(1, rows_of(plan.slot, values.shape[0]), norm, "amax", include_self=True)[..., None]


def token_merge(
    x: Tensor,
    plan: MergePlan,
    mode: str = "mean",
    weights: Tensor | None = None,
    *,
    norm_eps: float | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """(B, N, C) tokens to (B, M, C) slots; see the public op for the modes and the norm."""
    if norm_eps is not None:
        return token_merge_norm(x, plan, weights, norm_eps, norm_weight, norm_bias, scale, shift)
    batch, _, channels = x.shape
    if mode == "prune":
        return x.gather(1, rows_of(plan.anchor, batch)[..., None].expand(-1, -1, channels))
    values = x.to(compute_dtype(x))
    mean = segment_mean(values, plan, weights)
    if mode == "mlerp":
        length = mean.square().sum(-1, keepdim=True).sqrt()
        mean = mean * (_largest_norm(values, plan) / torch.where(length == 0, torch.ones_like(length), length))
    return mean.to(x.dtype)
