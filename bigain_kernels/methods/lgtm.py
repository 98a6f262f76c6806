"""Laplacian-gated token merging (L-GTM), BiGain, arXiv 2603.12240."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..checks import check_count
from ..ops.lgtm_plan import call
from ..plan import MergePlan
from ._common import check_method
from .config import MergeConfig
from .options import Count, option


def lgtm_plan(
    x: Tensor,
    grid: tuple[int, int],
    ratio: float,
    stride: tuple[int, int] = (2, 2),
    *,
    window: int | None = None,
    share_plan: int | None = None,
) -> MergePlan:
    """Plan of Laplacian-gated token merging.

    The smoothest token of each sy x sx tile (lowest L1 Laplacian score) becomes a destination; the int(N * ratio)
    sources most similar to a destination merge into it. Source: BiGain, arXiv 2603.12240.

    Args:
        x: (B, N, C) hidden states in raster order.
        grid: (H, W) with H * W = N.
        ratio: fraction of tokens removed, 0 to `max_ratio(grid, stride)`.
        stride: (sy, sx), the size of a tile in tokens.
        window: compare only with destinations of tiles at most this many tiles away; None compares with all.
        share_plan: k rows share one plan, made from their mean: batch row b uses plan row b mod (B / k).

    Returns:
        MergePlan with B rows (B / k with `share_plan`) and N - int(N * ratio) slots.

    Raises:
        TypeError, ValueError: wrong type, dtype, rank, grid, ratio, stride, window or share_plan.
    """
    grid, stride, r, share = check_method(x, grid, ratio, stride, share_plan)
    if window is not None:
        window = check_count("window", window)
    slot, offsets, members, anchor = call(x, *grid, *stride, r, -1 if window is None else window, share)
    return MergePlan(slot, offsets, members, anchor, grid, x.shape[1] - r)


@dataclass(frozen=True, kw_only=True)
class LGTMConfig(MergeConfig):
    """Laplacian-gated token merging (BiGain, arXiv 2603.12240); see `bigain_kernels.lgtm_plan`.

    Args:
        window: compare a source only with destinations of tiles at most this many tiles away; by default with all.
        others: see `MergeConfig` and `CompressionConfig`.
    """

    method: ClassVar[str] = "lgtm"

    window: int | None = option(None, Count())

    def plan(self, x: Tensor, grid: tuple[int, int], ratio: float, timestep: Tensor | None = None) -> MergePlan:
        return lgtm_plan(x, grid, ratio, self.stride, window=self.window, share_plan=self.share_plan)
