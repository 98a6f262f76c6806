"""Merging the tokens of a LayerNorm by a plan, without these in memory: statistics in one launch, the merge in another.

The kernel is that of `token_merge`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import configs
from ._common import unit_last_stride
from .row_stats import launch_row_stats
from .token_merge import launch


def launch_token_merge_norm(
    x: Tensor,
    slot: Tensor,
    offsets: Tensor,
    members: Tensor,
    anchor: Tensor,
    weights: Tensor | None = None,
    norm_eps: float = 1e-5,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    config: configs.Config | None = None,
) -> Tensor:
    """The mean of LayerNorm(x), not rounded in between: (B, N, C) tokens to (B, M, C) slots by tables of P rows.

    Args:
        x: (B, N, C).
        slot, offsets, members, anchor: (P, N), (P, M + 1), (P, N), (P, M) int32; P divides B.
        weights: (B, N) weights of the tokens, or None.
        norm_eps: added to the variances.
        norm_weight, norm_bias: (C,) of the LayerNorm, both or neither.
        scale, shift: (B, C), both or neither: (1 + scale) * normalized + shift, as adaLN has it.
        config: a candidate of `token_merge`.
    """
    x = unit_last_stride(x)
    if x.shape[0] * anchor.shape[1] * x.shape[2] == 0:
        return torch.empty((x.shape[0], anchor.shape[1], x.shape[2]), dtype=x.dtype, device=x.device)
    affine = _both("norm_weight", norm_weight, "norm_bias", norm_bias)
    modulation = _both("scale", scale, "shift", shift)
    statistics = launch_row_stats(x, "layernorm", norm_eps)
    return launch(x, slot, offsets, members, anchor, "mean", weights, statistics, affine, modulation, config)


def _both(name: str, one: Tensor | None, other_name: str, other: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Both tensors, or None for neither."""
    if one is None and other is None:
        return None
    if one is None or other is None:
        missing, given = (name, other_name) if one is None else (other_name, name)
        raise ValueError(f"{missing}: got None, expected a tensor, as {given} is one")
    return one, other
