"""Op `bigain::select_destinations`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_grid, check_pair, check_tensor
from ..declaration import Op, grid, pair, tensor
from ._flops import none
from ._library import define
from ._shapes import tiles

OP = Op(
    "select_destinations",
    (tensor("score"), grid(), pair("stride", "sy", "sx")),
    "Tensor",
    fake=lambda score, grid, stride: score.new_empty(
        (score.shape[0], tiles("stride", grid, stride)), dtype=torch.int32
    ),
    flops=none,
    samples=lambda s: {"": (s.score, s.grid, s.stride)},
    selects=True,
)
_call = define(OP)


def select_destinations(score: Tensor, grid: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """The token of the lowest score in each sy x sx tile.

    Tiles cover the top-left (H // sy * sy) x (W // sx * sx) region; the leftover strips hold only sources. Ties go to
    the lowest token index; NaN counts as +inf. Source: BiGain, arXiv 2603.12240 (true tiles; the published code looks
    at strips, see `bigain_kernels.compat`).

    Args:
        score: (B, N) float32.
        grid: (H, W) with H * W = N.
        stride: (sy, sx), the size of a tile in tokens.

    Returns:
        (B, D) int32 token indices, ascending in each row, with D = (H // sy) * (W // sx).

    Raises:
        TypeError, ValueError: wrong type, dtype, rank, grid or stride.
    """
    check_tensor("score", score, 2, (torch.float32,))
    height, width = check_grid(grid, score.shape[1], "score")
    sy, sx = check_pair("stride", stride)
    return _call(score, height, width, sy, sx)
