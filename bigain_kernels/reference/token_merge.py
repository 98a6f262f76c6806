"""Merging tokens by a plan, and copying the result back to every token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..plan import MergePlan
from .laplacian_score import compute_dtype


def _rows(table: Tensor, batch: int) -> Tensor:
    """A plan table (P, ...) as int64 for `batch` = k * P rows; batch row b gets plan row b mod P."""
    repeats = batch // table.shape[0] if table.shape[0] else 1
    return table.long().repeat(repeats, 1)


def _segment_sum(values: Tensor, plan: MergePlan) -> Tensor:
    """Sum of (B, N, C) values over the members of each slot, in ascending token order; (B, M, C)."""
    batch, n, channels = values.shape
    m = plan.num_slots
    first = torch.arange(batch, device=values.device)[:, None]
    if values.is_cuda:
        # index_add_ adds in any order on CUDA; a segment reduction walks each segment from its start.
        members = (_rows(plan.members, batch) + first * n).flatten()
        starts = (_rows(plan.offsets, batch)[:, :-1] + first * n).flatten()
        offsets = torch.cat([starts, members.new_full((1,), batch * n)])
        total = torch.segment_reduce(values.reshape(batch * n, channels)[members], "sum", offsets=offsets, axis=0)
    else:
        slots = (_rows(plan.slot, batch) + first * m).flatten()
        total = values.new_zeros(batch * m, channels).index_add_(0, slots, values.reshape(batch * n, channels))
    return total.view(batch, m, channels)


def _largest_norm(values: Tensor, plan: MergePlan) -> Tensor:
    """The largest L2 norm among the members of each slot; (B, M, 1)."""
    norm = values.square().sum(-1).sqrt()
    largest = norm.new_zeros(values.shape[0], plan.num_slots)
    return largest.scatter_reduce_(1, _rows(plan.slot, values.shape[0]), norm, "amax", include_self=True)[..., None]


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
    batch, _, channels = x.shape
    if mode == "prune":
        return x.gather(1, _rows(plan.anchor, batch)[..., None].expand(-1, -1, channels))
    values = x.to(compute_dtype(x))
    if norm_eps is not None:
        values = _layer_norm(values, norm_eps, norm_weight, norm_bias, scale, shift)
    if weights is None:
        mean = _segment_sum(values, plan) / _rows(plan.sizes(), batch)[..., None].to(values.dtype)
    else:
        factor = weights.to(values.dtype)[..., None]
        mean = _segment_sum(values * factor, plan) / _segment_sum(factor, plan)
    if mode == "mlerp":
        length = mean.square().sum(-1, keepdim=True).sqrt()
        scale = _largest_norm(values, plan) / torch.where(length == 0, torch.ones_like(length), length)
        mean = mean * scale
    return mean.to(x.dtype)


def token_unmerge(y: Tensor, plan: MergePlan, residual: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
    """(B, M, C) slots to (B, N, C) tokens: gate * y[slot] + residual, rounded once."""
    batch, _, channels = y.shape
    tokens = y.gather(1, _rows(plan.slot, batch)[..., None].expand(-1, -1, channels))
    if residual is None and gate is None:
        return tokens
    values = tokens.to(compute_dtype(y))
    if gate is not None:
        values = values * gate.to(values.dtype)[:, None, :]
    if residual is not None:
        values = values + residual.to(values.dtype)
    return values.to(y.dtype)
