"""Packed sequences of odd lengths for tests: some with text, some without an image, some empty."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

Grid = tuple[int, int]
# Text tokens in front of the image and behind it, and its grid.
SEQUENCES = [
    (2, 0, (3, 4)),
    (0, 0, None),
    (5, 0, None),
    (0, 1, (5, 3)),
    (3, 2, (3, 4)),
    (0, 0, (1, 1)),
    (0, 0, None),
]  # fmt: skip


class Packing(NamedTuple):
    """x (total, ...), where its sequences begin, and where the images do."""

    x: Tensor
    cu_seqlens: Tensor
    grids: list[Grid | None]
    starts: Tensor

    def parts(self, x: Tensor | None = None) -> list[tuple[Tensor, Tensor, Tensor]]:
        """By sequence, what is in front of the image, the image, and what is behind it."""
        found, x = [], self.x if x is None else x
        for (front, behind, grid), begin in zip(SEQUENCES, self.cu_seqlens.tolist(), strict=False):
            image = 0 if grid is None else grid[0] * grid[1]
            end = begin + front + image + behind
            found.append((x[begin : begin + front], x[begin + front : end - behind], x[end - behind : end]))
        return found


def packing(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Packing:
    """Random tokens of a shape, packed."""
    grids = [grid for _, _, grid in SEQUENCES]
    lengths = [front + behind + (grid[0] * grid[1] if grid else 0) for front, behind, grid in SEQUENCES]
    ends = [0, *accumulate(lengths)]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ends[-1], *shape, generator=generator).to(dtype)
    starts = [end + front for end, (front, _, _) in zip(ends, SEQUENCES, strict=False)]
    return Packing(x, torch.tensor(ends, dtype=torch.int32), grids, torch.tensor(starts, dtype=torch.int32))
