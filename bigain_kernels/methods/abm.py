"""Adaptive block merging (ABM), BiGain, arXiv 2603.12240."""

from __future__ import annotations

from torch import Tensor

from ..ops import block_merge_plan, laplacian_score
from ..plan import MergePlan
from ..reference.lgtm_plan import share_mean
from ._common import check_method


def abm_plan(
    x: Tensor,
    grid: tuple[int, int],
    ratio: float,
    stride: tuple[int, int] = (2, 2),
    *,
    reduce: str = "max",
    share_plan: int | None = None,
) -> MergePlan:
    """Plan of adaptive block merging: the smoothest tiles merge whole, without matching.

    Source: BiGain, arXiv 2603.12240.

    Args:
        x: (B, N, C) hidden states in raster order.
        grid: (H, W) with H * W = N.
        ratio: fraction of tokens removed, 0 to `max_ratio(grid, stride)`; at most int(N * ratio) tokens go, as tiles
            merge whole.
        stride: (sy, sx), the size of a tile in tokens.
        reduce: how a tile's scores become one: "max", "sum", "mean", "min" or "std".
        share_plan: k rows share one plan, made from their mean: batch row b uses plan row b mod (B / k).

    Returns:
        MergePlan with B rows (B / k with `share_plan`).

    Raises:
        TypeError, ValueError: wrong type, dtype, rank, grid, ratio, stride, reduce or share_plan.
    """
    grid, stride, r = check_method(x, grid, ratio, stride, share_plan)
    score = laplacian_score(share_mean(x, share_plan or 1), grid)
    return block_merge_plan(score, grid, stride, r, reduce)
