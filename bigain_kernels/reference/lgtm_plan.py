"""The whole of L-GTM planning (BiGain, arXiv 2603.12240): score, destinations, matching, plan."""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan import MergePlan
from .bipartite_match import bipartite_match
from .laplacian_score import laplacian_score
from .merge_plan import merge_plan
from .select_destinations import select_destinations


def share_mean(x: Tensor, share: int) -> Tensor:
    """Mean of the `share` rows that share a plan: (k * P, N, C) to (P, N, C), row b belonging to plan row b mod P.

    The mean is accumulated in float32 and rounded to the dtype of x.
    """
    if share == 1:
        return x
    rows = x.unflatten(0, (share, x.shape[0] // share))
    return rows.to(torch.promote_types(x.dtype, torch.float32)).mean(0).to(x.dtype)


def lgtm_plan(
    x: Tensor, grid: tuple[int, int], stride: tuple[int, int], r: int, window: int | None = None, share: int = 1
) -> MergePlan:
    """The plan of (B, N, C) tokens, with B / share rows and N - r slots."""
    x = share_mean(x, share)
    destinations = select_destinations(laplacian_score(x, grid), grid, stride)
    similarity, match = bipartite_match(x, destinations, window, grid, stride)
    return merge_plan(similarity, match, destinations, r, grid)
