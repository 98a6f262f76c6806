"""Adaptive block merging (ABM), BiGain, arXiv 2603.12240."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..ops import block_merge_plan, laplacian_score
from ..ops.block_merge_plan import REDUCTIONS
from ..plan import MergePlan
from ..tokens import share_mean
from ._common import check_method
from .config import MergeConfig
from .options import Choice, option


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
    grid, stride, r, share = check_method(x, grid, ratio, stride, share_plan)
    score = laplacian_score(share_mean(x.detach(), share), grid)
    return block_merge_plan(score, grid, stride, r, reduce)


@dataclass(frozen=True, kw_only=True)
class ABMConfig(MergeConfig):
    """Adaptive block merging (BiGain, arXiv 2603.12240): whole smooth tiles merge; see `bigain_kernels.abm_plan`.

    Args:
        reduce: how the scores of a tile become one: "max", "sum", "mean", "min" or "std".
        others: see `MergeConfig` and `CompressionConfig`.
    """

    method: ClassVar[str] = "abm"

    reduce: str = option("max", Choice(REDUCTIONS))

    def plan(self, x: Tensor, grid: tuple[int, int], ratio: float, timestep: Tensor | None = None) -> MergePlan:
        return abm_plan(x, grid, ratio, self.stride, reduce=self.reduce, share_plan=self.share_plan)

    def tokens_kept(self, grid: tuple[int, int], level: int = 1) -> int:
        tokens, of_a_tile = grid[0] * grid[1], self.stride[0] * self.stride[1] - 1
        merged = tokens - super().tokens_kept(grid, level)
        return tokens - (merged - merged % of_a_tile if of_a_tile else 0)
