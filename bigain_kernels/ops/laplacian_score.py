"""Op `bigain::laplacian_score`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_choice, check_frames, check_tensor
from ..declaration import Op, choice, count, grid, tensor
from ._flops import none
from ._library import define

NORMS = ("l1", "l2")

OP = Op(
    "laplacian_score",
    (tensor("x"), grid(), choice("norm"), count("frames", 1)),
    "Tensor",
    fake=lambda x, grid, norm, frames: x.new_empty(x.shape[:2], dtype=torch.float32),
    flops=none,
    samples=lambda s: {
        **{norm: (s.x, s.grid, norm, 1) for norm in NORMS},
        # Two rows of the batch are the two frames of one video.
        "frames": (s.x[:2].reshape(1, -1, s.x.shape[2]), s.grid, "l1", 2),
    },
)
_call = define(OP)


def laplacian_score(x: Tensor, grid: tuple[int, int] | tuple[int, int, int], norm: str = "l1") -> Tensor:
    """Frequency score of every token: the norm over channels of the 3x3 Laplacian response of the token grid.

    With x[n] the token at (row, column), the response is 4 x[n] minus its four neighbours, tokens outside the grid
    being zero. Low scores are smooth, high scores are edges and texture. Source: BiGain, arXiv 2603.12240.

    The tokens of a video have two neighbours more, those of the same place in the frames before and after: the response
    is that of the frame plus 2 x[n] minus these two. Where there is no such frame the token itself stands for it, so
    that a still video is scored as its frames are.

    Args:
        x: (B, N, C) tokens in raster order; float16, bfloat16, float32 or float64, any strides.
        grid: (H, W) with H * W = N; or of a video (T, H, W) with T * H * W = N, one frame after another.
        norm: "l1", the sum of absolute values over channels, or "l2".

    Returns:
        (B, N) float32, computed in float32 (float64 for float64 input).

    Raises:
        TypeError, ValueError: wrong type, dtype, rank, grid or norm.
        RuntimeError: on differentiation; what selects tokens is a constant.
    """
    check_tensor("x", x, 3)
    frames, (height, width) = check_frames(grid, x.shape[1], "x")
    check_choice("norm", norm, NORMS)
    return _call(x, height, width, norm, frames or 1)
