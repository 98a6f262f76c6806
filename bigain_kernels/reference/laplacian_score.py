"""Frequency score of each token and the smoothest token of each tile (BiGain, arXiv 2603.12240, section on L-GTM)."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def laplacian_score(x: Tensor, grid: tuple[int, int], norm: str = "l1") -> Tensor:
    """score[b, n] = || 4 x[n] - x[above] - x[below] - x[left] - x[right] ||, zero outside the grid; (B, N) float32."""
    image = x.unflatten(1, grid).to(compute_dtype(x))
    response = 4 * image
    response[:, 1:] -= image[:, :-1]
    response[:, :-1] -= image[:, 1:]
    response[:, :, 1:] -= image[:, :, :-1]
    response[:, :, :-1] -= image[:, :, 1:]
    score = response.abs_().sum(-1) if norm == "l1" else response.square_().sum(-1).sqrt_()
    return score.flatten(1).float()


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
    tiles = split_tiles(score.masked_fill(score.isnan(), torch.inf), grid, stride)
    # argmin returns the first of equal minima, and row-major order inside a tile is the order of token indices.
    return tile_tokens(tiles.argmin(dim=-1), grid, stride)
