"""Ops `bigain::laplacian_score` and `bigain::select_destinations`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..checks import check_choice, check_grid, check_pair, check_tensor
from ._library import define

NORMS = ("l1", "l2")

define(
    "laplacian_score(Tensor x, SymInt height, SymInt width, str norm) -> Tensor",
    lambda x, height, width, norm: reference.laplacian_score(x, (height, width), norm),
    lambda x, height, width, norm: x.new_empty(x.shape[:2], dtype=torch.float32),
)
define(
    "select_destinations(Tensor score, SymInt height, SymInt width, SymInt sy, SymInt sx) -> Tensor",
    lambda score, height, width, sy, sx: reference.select_destinations(score, (height, width), (sy, sx)),
    lambda score, height, width, sy, sx: score.new_empty(
        (score.shape[0], (height // sy) * (width // sx)), dtype=torch.int32
    ),
)


def laplacian_score(x: Tensor, grid: tuple[int, int], norm: str = "l1") -> Tensor:
    """Frequency score of every token: the norm over channels of the 3x3 Laplacian response of the token grid.

    With x[n] the token at (row, column), the response is 4 x[n] minus its four neighbours, tokens outside the grid
    being zero. Low scores are smooth, high scores are edges and texture. Source: BiGain, arXiv 2603.12240.

    Args:
        x: (B, N, C) tokens in raster order; float16, bfloat16, float32 or float64, any strides.
        grid: (H, W) with H * W = N.
        norm: "l1", the sum of absolute values over channels, or "l2".

    Returns:
        (B, N) float32, computed in float32 (float64 for float64 input).

    Raises:
        TypeError, ValueError: wrong type, dtype, rank, grid or norm.
        RuntimeError: on differentiation; the op is for inference.
    """
    check_tensor("x", x, 3)
    height, width = check_grid(grid, x.shape[1], "x")
    check_choice("norm", norm, NORMS)
    return torch.ops.bigain.laplacian_score(x, height, width, norm)


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
    return torch.ops.bigain.select_destinations(score, height, width, sy, sx)
