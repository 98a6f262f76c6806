"""Sums and means over the members of each slot of a plan."""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan import MergePlan


def rows_of(table: Tensor, batch: int) -> Tensor:
    """A plan table (P, ...) as int64 for `batch` = k * P rows; batch row b gets plan row b mod P."""
    repeats = batch // table.shape[0] if table.shape[0] else 1
    return table.long().repeat(repeats, 1)


def segment_sum(values: Tensor, plan: MergePlan) -> Tensor:
    """Sum of (B, N, C) values over the members of each slot, in ascending token order; (B, M, C)."""
    batch, n, channels = values.shape
    m = plan.num_slots
    first = torch.arange(batch, device=values.device)[:, None]
    if values.is_cuda:
        # index_add_ adds in any order on CUDA; a segment reduction walks each segment from its start.
        members = (rows_of(plan.members, batch) + first * n).flatten()
        starts = (rows_of(plan.offsets, batch)[:, :-1] + first * n).flatten()
        offsets = torch.cat([starts, members.new_full((1,), batch * n)])
        total = torch.segment_reduce(values.reshape(batch * n, channels)[members], "sum", offsets=offsets, axis=0)
    else:
        slots = (rows_of(plan.slot, batch) + first * m).flatten()
        total = values.new_zeros(batch * m, channels).index_add_(0, slots, values.reshape(batch * n, channels))
    return total.view(batch, m, channels)


def segment_mean(values: Tensor, plan: MergePlan, weights: Tensor | None) -> Tensor:
    """Mean of (B, N, C) values over the members of each slot, weighted by (B, N) weights; (B, M, C)."""
    if weights is None:
        return segment_sum(values, plan) / rows_of(plan.sizes(), values.shape[0])[..., None].to(values.dtype)
    factor = weights.to(values.dtype)[..., None]
    return segment_sum(values * factor, plan) / segment_sum(factor, plan)
