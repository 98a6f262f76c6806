"""Best destination of every source by cosine similarity (bipartite soft matching of ToMe, Bolya et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from .laplacian_score import compute_dtype

# Sources are matched this many similarities at a time, so that the (N, D) matrix is never held. The block depends on D
# alone; torch may still multiply a batch of one in another way than a larger one, to other last bits.
_BLOCK_SIMILARITIES = 1 << 20


def _tile_of(tokens: Tensor, grid: tuple[int, int], stride: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Tile row and column of token indices; leftover strips belong to the nearest real tile."""
    last_y, last_x = max(grid[0] // stride[0] - 1, 0), max(grid[1] // stride[1] - 1, 0)
    tile_y = (tokens // grid[1] // stride[0]).clamp(max=last_y)
    tile_x = (tokens % grid[1] // stride[1]).clamp(max=last_x)
    return tile_y, tile_x


def bipartite_match(
    x: Tensor,
    destinations: Tensor,
    window: int | None = None,
    grid: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """similarity (B, N) float32 and match (B, N) int32 of every token over the (B, D) destinations."""
    batch, n, channels = x.shape
    tokens = torch.arange(n, device=x.device)
    match = tokens.repeat(batch, 1)
    similarity = torch.full((batch, n), -torch.inf, dtype=compute_dtype(x), device=x.device)
    index = destinations.long()
    if index.shape[1] == 0:
        return similarity.float(), match.int()

    values = x.to(compute_dtype(x))
    norm = values.square().sum(-1).sqrt()
    # A token without a direction (zero, NaN, or too large for the compute type) is similar to nothing.
    usable = (norm > 0) & norm.isfinite()
    unit = values / torch.where(usable, norm, torch.ones_like(norm))[..., None]
    unit_destinations = unit.gather(1, index[..., None].expand(-1, -1, channels)).transpose(1, 2)
    usable_destinations = usable.gather(1, index)[:, None, :]
    if window is not None:
        assert grid is not None
        assert stride is not None
        token_y, token_x = _tile_of(tokens, grid, stride)
        destination_y, destination_x = _tile_of(index, grid, stride)

    block = max(64, _BLOCK_SIMILARITIES // index.shape[1])
    for start in range(0, n, block):
        rows = slice(start, min(start + block, n))
        cosine = torch.bmm(unit[:, rows], unit_destinations)
        allowed = usable[:, rows, None] & usable_destinations
        if window is not None:
            distance_y = (token_y[rows][None, :, None] - destination_y[:, None, :]).abs()
            distance_x = (token_x[rows][None, :, None] - destination_x[:, None, :]).abs()
            allowed = allowed & (torch.maximum(distance_y, distance_x) <= window)
        # max returns the first of equal maxima: destinations ascend, so ties go to the lowest token index.
        best = cosine.masked_fill_(~allowed, -torch.inf).max(dim=2)
        similarity[:, rows] = best.values
        match[:, rows] = index.gather(1, best.indices)

    similarity.scatter_(1, index, -torch.inf)
    match.scatter_(1, index, index)
    return similarity.float(), match.int()
