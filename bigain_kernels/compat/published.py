"""What the published BiGain, ToMe and mlerp code computes, for comparing results with theirs.

Each function states how it differs from the paper and from this package. Use `bigain_kernels` itself for anything else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_grid, check_pair, check_plan, check_tensor
from ..methods._common import check_method, match_and_plan
from ..ops import laplacian_score, token_merge
from ..plan import MergePlan
from ..tokens import tile_tokens


def published_destinations(score: Tensor, grid: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Destinations under the rule of the published code, which forgets to bring tile columns together.

    The argmin is taken over runs of sy * sx tokens of the flattened band of sy rows (for 2 x 2: a strip of 1 x 4), and
    its position in the run is read as a position in the tile; so most destinations are not the smoothest of their tile.

    Args:
        score: (B, N) float32.
        grid: (H, W) with H * W = N.
        stride: (sy, sx).

    Returns:
        (B, D) int32 token indices, ascending, D = (H // sy) * (W // sx).

    Raises:
        TypeError, ValueError: wrong type, dtype, rank, grid or stride.
    """
    check_tensor("score", score, 2, (torch.float32,))
    grid = check_grid(grid, score.shape[1], "score")
    sy, sx = check_pair("stride", stride)
    tiles_y, tiles_x = grid[0] // sy, grid[1] // sx
    bands = score.unflatten(1, grid)[:, : tiles_y * sy, : tiles_x * sx]
    runs = bands.reshape(score.shape[0], tiles_y, tiles_x, sy * sx)
    return tile_tokens(runs.argmin(dim=-1), grid, (sy, sx))


def published_lgtm_plan(x: Tensor, grid: tuple[int, int], ratio: float, stride: tuple[int, int] = (2, 2)) -> MergePlan:
    """L-GTM with `published_destinations`; arguments, result and errors as `bigain_kernels.lgtm_plan`."""
    grid, stride, r, _ = check_method(x, grid, ratio, stride, None)
    destinations = published_destinations(laplacian_score(x.detach(), grid), grid, stride)
    return match_and_plan(x, destinations, r, grid, stride, None)


def pattern_destinations(
    x: Tensor, grid: tuple[int, int], stride: tuple[int, int], generator: torch.Generator | None
) -> Tensor:
    """ToMe's destinations, one pattern for all rows of x: (B, D) int32, ascending.

    Args:
        x: (B, N, C) tokens; read for their number, batch and device.
        grid: (H, W) with H * W = N.
        stride: (sy, sx).
        generator: advanced by one `randint` of (H // sy, W // sx, 1); None takes the top-left token of each tile.

    Raises:
        TypeError, ValueError: wrong rank, dtype, grid or stride.
    """
    check_tensor("x", x, 3)
    grid = check_grid(grid, x.shape[1], "x")
    sy, sx = check_pair("stride", stride)
    size = (grid[0] // sy, grid[1] // sx, 1)
    if generator is None:
        inside = torch.zeros(size, dtype=torch.int64, device=x.device)
    else:
        inside = torch.randint(sy * sx, size=size, generator=generator, device=generator.device).to(x.device)
    return tile_tokens(inside[None, ..., 0], grid, (sy, sx)).expand(x.shape[0], -1).contiguous()


def published_tome_plan(
    x: Tensor, grid: tuple[int, int], ratio: float, stride: tuple[int, int], generator: torch.Generator
) -> MergePlan:
    """ToMe with the random destinations of the published code: one pattern per batch, from a moving generator.

    Args:
        x: (B, N, C) hidden states in raster order.
        grid: (H, W) with H * W = N.
        ratio: fraction of tokens removed.
        stride: (sy, sx).
        generator: a generator of torch, advanced by one `randint` of (H // sy, W // sx, 1).

    Returns:
        MergePlan with B rows.

    Raises:
        TypeError, ValueError: wrong type, dtype, rank, grid, ratio or stride.
    """
    grid, stride, r, _ = check_method(x, grid, ratio, stride, None)
    return match_and_plan(x, pattern_destinations(x, grid, stride, generator), r, grid, stride, None)


def published_mlerp(x: Tensor, plan: MergePlan) -> Tensor:
    """The published mlerp: the mean rescaled to the largest norm of the merged *sources*, the destination's left out.

    Args:
        x: (B, N, C) tokens.
        plan: MergePlan for N tokens with B rows.

    Returns:
        (B, M, C) in the dtype of x; slots of one token keep it as it is.

    Raises:
        TypeError, ValueError: wrong type, dtype, rank or plan.
    """
    check_tensor("x", x, 3)
    check_plan(plan, "x", x, "num_tokens")
    slot = plan.slot.long()
    mean = token_merge(x, plan).to(torch.promote_types(x.dtype, torch.float32))
    norm = x.to(mean.dtype).norm(dim=-1)
    alone = plan.sizes().gather(1, slot) == 1
    is_anchor = plan.assign() == torch.arange(x.shape[1], device=x.device)
    counted = norm.masked_fill(is_anchor & ~alone, 0.0)
    largest = counted.new_zeros(plan.anchor.shape).scatter_reduce_(1, slot, counted, "amax")
    return (mean / mean.norm(dim=-1, keepdim=True) * largest[..., None]).to(x.dtype)
