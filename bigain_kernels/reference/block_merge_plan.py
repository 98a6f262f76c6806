"""From tile scores to a MergePlan (adaptive block merging, BiGain, arXiv 2603.12240)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan import MergePlan
from .merge_plan import plan_from_assignment
from .select_destinations import split_tiles


def reduce_tiles(tiles: Tensor, reduce: str) -> Tensor:
    """(B, T, sy * sx) scores to (B, T); std is the population standard deviation."""
    if reduce == "max":
        return tiles.amax(-1)
    if reduce == "min":
        return tiles.amin(-1)
    if reduce == "sum":
        return tiles.sum(-1)
    if reduce == "mean":
        return tiles.mean(-1)
    return (tiles - tiles.mean(-1, keepdim=True)).square().mean(-1).sqrt()


def merged_tiles(grid: tuple[int, int], stride: tuple[int, int], r: int) -> int:
    """How many whole tiles `block_merge_plan` merges to remove at most r tokens."""
    tiles, removed = (grid[0] // stride[0]) * (grid[1] // stride[1]), stride[0] * stride[1] - 1
    return min(r // removed, tiles) if removed else 0


def block_merge_plan(
    score: Tensor, grid: tuple[int, int], stride: tuple[int, int], r: int, reduce: str = "max"
) -> MergePlan:
    """The smoothest tiles merge whole into their top-left tokens; ties to the lowest tile, NaN counted as +inf."""
    batch, n = score.shape
    (_, width), (sy, sx) = grid, stride
    tiles = split_tiles(score.double(), grid, stride)
    tiles_y, tiles_x = tiles.shape[1:3]
    value = reduce_tiles(tiles.flatten(1, 2), reduce)
    value = value.masked_fill(value.isnan(), torch.inf)
    count = merged_tiles(grid, stride, r)
    chosen = value.argsort(dim=1, stable=True)[:, :count]
    is_merged = torch.zeros((batch, tiles_y * tiles_x), dtype=torch.bool, device=score.device)
    is_merged.scatter_(1, chosen, True)

    tokens = torch.arange(n, device=score.device)
    row, column = tokens // width, tokens % width
    tile_y, tile_x = row // sy, column // sx
    inside = (tile_y < tiles_y) & (tile_x < tiles_x)
    tile = torch.where(inside, tile_y * tiles_x + tile_x, 0)
    top_left = tile_y * sy * width + tile_x * sx
    # Without a single tile there is nothing to look up.
    in_merged_tile = is_merged[:, tile] & inside if tiles_y * tiles_x else inside.expand(batch, n)
    assign = torch.where(in_merged_tile, top_left, tokens.expand(batch, n))
    return plan_from_assignment(assign, n - count * (sy * sx - 1), grid)
