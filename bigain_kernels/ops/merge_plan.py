"""Ops `bigain::merge_plan` and `bigain::block_merge_plan`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..checks import check_choice, check_count, check_grid, check_pair, check_same_device, check_tensor
from ..plan import MergePlan
from ..reference.merge_plan import merged_tiles
from ._library import define

REDUCTIONS = ("max", "sum", "mean", "min", "std")
_Tables = tuple[Tensor, Tensor, Tensor, Tensor]


def _tables(plan: MergePlan) -> _Tables:
    return plan.slot, plan.offsets, plan.members, plan.anchor


def _fake_tables(like: Tensor, num_slots: int) -> _Tables:
    batch, n = like.shape
    widths = (n, num_slots + 1, n, num_slots)
    slot, offsets, members, anchor = (like.new_empty((batch, w), dtype=torch.int32) for w in widths)
    return slot, offsets, members, anchor


define(
    "merge_plan(Tensor similarity, Tensor match, Tensor destinations, SymInt r) -> (Tensor, Tensor, Tensor, Tensor)",
    # The tables do not depend on the grid, which the public function adds to the plan.
    lambda similarity, match, destinations, r: _tables(
        reference.merge_plan(similarity, match, destinations, r, (1, similarity.shape[1]))
    ),
    lambda similarity, match, destinations, r: _fake_tables(similarity, similarity.shape[1] - r),
)
define(
    "block_merge_plan(Tensor score, SymInt height, SymInt width, SymInt sy, SymInt sx, SymInt r, str reduce)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    lambda score, height, width, sy, sx, r, reduce: _tables(
        reference.block_merge_plan(score, (height, width), (sy, sx), r, reduce)
    ),
    lambda score, height, width, sy, sx, r, reduce: _fake_tables(
        score, height * width - merged_tiles((height, width), (sy, sx), r) * (sy * sx - 1)
    ),
)


def merge_plan(similarity: Tensor, match: Tensor, destinations: Tensor, r: int, grid: tuple[int, int]) -> MergePlan:
    """The plan that merges the r best-matched sources into their destinations.

    Sources of the highest similarity merge; ties go to the lowest token index, NaN counts as -inf. r is clipped to the
    number of sources, N - D.

    Args:
        similarity: (B, N) float32, as `bipartite_match` returns it.
        match: (B, N) int32, token index of each source's destination.
        destinations: (B, D) int32 token indices, distinct in each row.
        r: how many sources merge, at least 0.
        grid: (H, W) with H * W = N.

    Returns:
        MergePlan with B rows and M = N - min(r, N - D) slots.

    Raises:
        TypeError, ValueError: wrong type, dtype, rank, device, shape, r or grid.
    """
    check_tensor("similarity", similarity, 2, (torch.float32,))
    check_tensor("match", match, 2, (torch.int32,))
    check_tensor("destinations", destinations, 2, (torch.int32,))
    height, width = check_grid(grid, similarity.shape[1], "similarity")
    if match.shape != similarity.shape:
        raise ValueError(
            f"match: got shape {tuple(match.shape)}, expected {tuple(similarity.shape)}, that of similarity"
        )
    n, d = similarity.shape[1], destinations.shape[1]
    if destinations.shape[0] != similarity.shape[0] or d > n:
        raise ValueError(
            f"destinations: got shape {tuple(destinations.shape)}, expected ({similarity.shape[0]}, D) with D <= {n}"
        )
    check_same_device(similarity=similarity, match=match, destinations=destinations)
    check_count("r", r)
    r = min(r, n - d) if d else 0
    slot, offsets, members, anchor = torch.ops.bigain.merge_plan(similarity, match, destinations, r)
    return MergePlan(slot, offsets, members, anchor, (height, width), n - r)


def block_merge_plan(
    score: Tensor, grid: tuple[int, int], stride: tuple[int, int], r: int, reduce: str = "max"
) -> MergePlan:
    """The plan of adaptive block merging (ABM): the smoothest sy x sx tiles merge whole, everything else stays.

    The r // (sy * sx - 1) tiles of the lowest reduced score merge into their top-left tokens, so at most r tokens go;
    ties go to the lowest tile, NaN counts as +inf. Leftover strips stay. Source: BiGain, arXiv 2603.12240.

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
    check_count("r", r)
    check_choice("reduce", reduce, REDUCTIONS)
    slot, offsets, members, anchor = torch.ops.bigain.block_merge_plan(score, height, width, sy, sx, r, reduce)
    removed = merged_tiles((height, width), (sy, sx), r) * (sy * sx - 1)
    return MergePlan(slot, offsets, members, anchor, (height, width), height * width - removed)
