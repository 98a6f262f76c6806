"""The smoothest token of each tile (BiGain, arXiv 2603.12240, section on L-GTM)."""

from __future__ import annotations

import torch
from torch import Tensor


def split_tiles(values: Tensor, grid: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """(B, N) per-token values as (B, H // sy, W // sx, sy * sx): the tiles of the top-left region, row-major inside."""
    (height, width), (sy, sx) = grid, stride
    tiles_y, tiles_x = height // sy, width // sx
    image = values.unflatten(1, grid)[:, : tiles_y * sy, : tiles_x * sx]
    return image.reshape(values.shape[0], tiles_y, sy, tiles_x, sx).transpose(2, 3).flatten(3)


def tile_tokens(inside: Tensor, grid: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Token indices, ascending, of one position per tile.

    `inside` is (B, H // sy, W // sx) int64, the row-major position inside the tile; the result is (B, D) int32.
    """
    (_, width), (sy, sx) = grid, stride
    tile_y = torch.arange(inside.shape[1], device=inside.device).unsqueeze(1)
    tile_x = torch.arange(inside.shape[2], device=inside.device)
    tokens = (tile_y * sy + inside // sx) * width + tile_x * sx + inside % sx
    return tokens.flatten(1).sort(dim=1).values.int()


def select_destinations(score: Tensor, grid: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """The lowest score of each tile, ties to the lowest token index, NaN counted as +inf; (B, D) int32, ascending."""
    if stride[0] > grid[0] or stride[1] > grid[1]:
        # No tile, and with such a stride none of no tokens either, which nothing could be chosen from.
        return score.new_empty((score.shape[0], 0), dtype=torch.int32)
    tiles = split_tiles(score.masked_fill(score.isnan(), torch.inf), grid, stride)
    # argmin returns the first of equal minima, and row-major order inside a tile is the order of token indices.
    return tile_tokens(tiles.argmin(dim=-1), grid, stride)
