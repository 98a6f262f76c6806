"""Small steps between the ops, on tokens and tiles."""

from __future__ import annotations

import torch
from torch import Tensor


def merged_tiles(grid: tuple[int, int], stride: tuple[int, int], r: int) -> int:
    """How many whole tiles `block_merge_plan` merges to remove at most r tokens."""
    tiles, removed = (grid[0] // stride[0]) * (grid[1] // stride[1]), stride[0] * stride[1] - 1
    return min(r // removed, tiles) if removed else 0


def share_mean(x: Tensor, share: int) -> Tensor:
    """Mean of the `share` rows that share a plan: (k * P, N, C) to (P, N, C), row b belonging to plan row b mod P.

    The mean is accumulated in float32 and rounded to the dtype of x.
    """
    if share == 1:
        return x
    rows = x.unflatten(0, (share, x.shape[0] // share))
    return rows.to(torch.promote_types(x.dtype, torch.float32)).mean(0).to(x.dtype)


def tile_tokens(inside: Tensor, grid: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Token indices, ascending, of one position per tile.

    `inside` is (B, H // sy, W // sx) int64, the row-major position inside the tile; the result is (B, D) int32.
    """
    (_, width), (sy, sx) = grid, stride
    tile_y = torch.arange(inside.shape[1], device=inside.device).unsqueeze(1)
    tile_x = torch.arange(inside.shape[2], device=inside.device)
    tokens = (tile_y * sy + inside // sx) * width + tile_x * sx + inside % sx
    return tokens.flatten(1).sort(dim=1).values.int()
