"""Op `bigain::block_merge_plan`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_choice, check_count, check_grid, check_pair, check_tensor
from ..declaration import Op, Tables, choice, count, grid, pair, tensor
from ..plan import MergePlan
from ..tokens import merged_tiles
from ._flops import none
from ._library import define
from ._shapes import PLAN, fake_tables, tiles

REDUCTIONS = ("max", "sum", "mean", "min", "std")


def _fake(score: Tensor, grid: tuple[int, int], stride: tuple[int, int], r: int, reduce: str) -> Tables:
    tiles("stride", grid, stride)
    removed = merged_tiles(grid, stride, r) * (stride[0] * stride[1] - 1)
    return fake_tables(score, score.shape[1] - removed)


OP = Op(
    "block_merge_plan",
    (tensor("score"), grid(), pair("stride", "sy", "sx"), count("r"), choice("reduce")),
    PLAN,
    fake=_fake,
    flops=none,
    samples=lambda s: {reduce: (s.score, s.grid, s.stride, s.r, reduce) for reduce in REDUCTIONS},
    selects=True,
)
_call = define(OP)


def block_merge_plan(
    score: Tensor, grid: tuple[int, int], stride: tuple[int, int], r: int, reduce: str = "max"
) -> MergePlan:
    """The plan of adaptive block merging (ABM): the smoothest sy x sx tiles merge whole, everything else stays.

    The r // (sy * sx - 1) tiles of the lowest reduced score merge into their top-left tokens, so at most r tokens go;
    ties go to the lowest tile, NaN counts as +inf. Leftover strips stay. Source: BiGain, arXiv 2603.12240.

    Tiles are reduced in float64, by the Triton kernels in float32. Those hold sums of up to 3e38 and, for "std",
    deviations from the mean of 1e-18 to 1e18; tiles whose numbers lie beyond may count as equal there.

    Args:
        score: (B, N) float32, as `laplacian_score` returns it.
        grid: (H, W) with H * W = N.
        stride: (sy, sx), the size of a tile in tokens.
        r: how many tokens to remove at most, at least 0; clipped to all whole tiles.
        reduce: how a tile's scores become one: "max", "sum", "mean", "min" or "std" (population).

    Returns:
        MergePlan with B rows.

    Raises:
        TypeError, ValueError: wrong type, dtype, rank, grid, stride, r or reduce.
    """
    check_tensor("score", score, 2, (torch.float32,))
    height, width = check_grid(grid, score.shape[1], "score")
    sy, sx = check_pair("stride", stride)
    r = check_count("r", r)
    check_choice("reduce", reduce, REDUCTIONS)
    slot, offsets, members, anchor = _call(score, height, width, sy, sx, r, reduce)
    removed = merged_tiles((height, width), (sy, sx), r) * (sy * sx - 1)
    return MergePlan(slot, offsets, members, anchor, (height, width), height * width - removed)
