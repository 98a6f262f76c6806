"""Op `bigain::bipartite_match`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_count, check_grid, check_pair, check_same_device, check_tensor
from ..declaration import Op, grid, pair, tensor, window
from ._flops import matching
from ._library import define

# Without a window, grid and stride are not looked at.
_NO_WINDOW = (-1, 1, 1, 1, 1)

OP = Op(
    "bipartite_match",
    (tensor("x"), tensor("destinations"), window(), grid(), pair("stride", "sy", "sx")),
    "(Tensor, Tensor)",
    fake=lambda x, destinations, window, grid, stride: (
        x.new_empty(x.shape[:2], dtype=torch.float32),
        x.new_empty(x.shape[:2], dtype=torch.int32),
    ),
    flops=lambda x, destinations, window, grid, stride: matching(x, destinations.shape[1], window, grid, stride),
    samples=lambda s: {
        "": (s.x, s.destinations, None, (1, 1), (1, 1)),
        "window": (s.x, s.destinations, 1, s.grid, s.stride),
    },
)
_call = define(OP)


def bipartite_match(
    x: Tensor,
    destinations: Tensor,
    window: int | None = None,
    grid: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The most similar destination of every source, by cosine similarity. The (N, D) matrix is never held.

    Ties go to the lowest token index. A token without a direction (all zero, NaN, or of a norm whose square overflows
    or vanishes) has similarity -inf to everything, so it is merged last; a source that no destination matches gets the
    first destination. Source: bipartite soft matching, Bolya et al., "Token Merging: Your ViT But Faster", 2023.

    Args:
        x: (B, N, C) tokens; float16, bfloat16, float32 or float64, any strides.
        destinations: (B, D) int32 token indices, ascending in each row.
        window: compare only with destinations of tiles at most this many tiles away (Chebyshev distance; tokens of the
            leftover strips belong to the nearest tile). None compares with all. Needs `grid` and `stride`.
        grid: (H, W) with H * W = N; read only with `window`.
        stride: (sy, sx), the size of a tile; read only with `window`.

    Returns:
        similarity (B, N) float32 and match (B, N) int32, a token index. At destinations: -inf and the token itself;
        likewise everywhere when D = 0.

    Raises:
        TypeError, ValueError: wrong type, dtype, rank, device, batch, window, grid or stride.
        RuntimeError: on differentiation; what selects tokens is a constant.
    """
    check_tensor("x", x, 3)
    check_tensor("destinations", destinations, 2, (torch.int32,))
    if destinations.shape[0] != x.shape[0]:
        raise ValueError(f"destinations: got {destinations.shape[0]} rows, expected {x.shape[0]}, the batch of x")
    if destinations.shape[1] > x.shape[1]:
        raise ValueError(
            f"destinations: got {destinations.shape[1]} a row, expected at most {x.shape[1]}, as x has tokens"
        )
    check_same_device(x=x, destinations=destinations)
    if window is None:
        return _call(x, destinations, *_NO_WINDOW)
    window = check_count("window", window)
    height, width = check_grid(grid, x.shape[1], "x")
    sy, sx = check_pair("stride", stride)
    return _call(x, destinations, window, height, width, sy, sx)
