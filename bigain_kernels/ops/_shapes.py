"""Shapes of results, for the fakes of the ops."""

from __future__ import annotations

import torch
from torch import Tensor

from ..declaration import Tables

# The tables of a plan, as a schema returns them.
PLAN = "(Tensor, Tensor, Tensor, Tensor)"


def tiles(name: str, grid: tuple[int, int], stride: tuple[int, int]) -> int:
    """How many whole tiles of the size `stride`, an argument called `name`, a grid has."""
    (height, width), (sy, sx) = grid, stride
    if sy < 1 or sx < 1:
        raise ValueError(f"{name}: got {(sy, sx)}, expected both to be at least 1")
    return (height // sy) * (width // sx)


def fake_tables(like: Tensor, num_slots: int, share: int = 1) -> Tables:
    """The tables of a plan for `like` (B, N, ...), on its device; every `share` rows have one plan."""
    rows, n = like.shape[0] // share, like.shape[1]
    widths = (n, num_slots + 1, n, num_slots)
    slot, offsets, members, anchor = (like.new_empty((rows, w), dtype=torch.int32) for w in widths)
    return slot, offsets, members, anchor
