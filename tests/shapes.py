"""Shapes and inputs that the tests of all layers share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# (grid, stride): divisible, odd, single tokens, single rows and columns, tiles larger than the grid.
GRIDS = [
    ((8, 8), (2, 2)),
    ((7, 5), (2, 2)),
    ((9, 13), (3, 2)),
    ((6, 11), (2, 3)),
    ((16, 16), (4, 4)),
    ((1, 1), (2, 2)),
    ((1, 9), (1, 2)),
    ((9, 1), (2, 1)),
    ((1, 7), (2, 2)),
    ((4, 6), (1, 1)),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def tokens(
    batch: int, n: int, channels: int, dtype: torch.dtype = torch.float32, seed: int = 0, strided: bool = False
) -> Tensor:
    """Random (batch, n, channels) tokens; `strided` makes them a slice of a larger tensor with real strides."""
    generator = torch.Generator().manual_seed(seed)
    if not strided:
        return torch.randn(batch, n, channels, generator=generator, dtype=torch.float64).to(dtype)
    whole = torch.randn(batch, n + 3, 2 * channels + 5, generator=generator, dtype=torch.float64).to(dtype)
    return whole[:, 2 : n + 2, 3 : channels + 3]


def tiles_of(grid: tuple[int, int], stride: tuple[int, int]) -> Iterator[list[int]]:
    """The tokens of each real tile, row-major inside, tiles in raster order."""
    (height, width), (sy, sx) = grid, stride
    for tile_y in range(height // sy):
        for tile_x in range(width // sx):
            yield [(tile_y * sy + i) * width + tile_x * sx + j for i in range(sy) for j in range(sx)]
