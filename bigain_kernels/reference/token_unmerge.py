"""Copying the slots of a plan back to every token."""

from __future__ import annotations

from torch import Tensor

from ..plan import MergePlan
from .laplacian_score import compute_dtype
from .segments import rows_of


def token_unmerge(y: Tensor, plan: MergePlan, residual: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
    """(B, M, C) slots to (B, N, C) tokens: gate * y[slot] + residual, rounded once."""
    batch, _, channels = y.shape
    tokens = y.gather(1, rows_of(plan.slot, batch)[..., None].expand(-1, -1, channels))
    if residual is None and gate is None:
        return tokens
    values = tokens.to(compute_dtype(y))
    if gate is not None:
        values = values * gate.to(values.dtype)[:, None, :]
    if residual is not None:
        values = values + residual.to(values.dtype)
    return values.to(y.dtype)
