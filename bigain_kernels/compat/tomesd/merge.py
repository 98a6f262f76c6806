"""`tomesd.merge`: matching as a function that gives a function to merge and one to copy back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..functions import Merge, Unmerge, bipartite_functions, do_nothing
from ..published import pattern_destinations

__all__ = ["bipartite_soft_matching_random2d", "do_nothing"]


def bipartite_soft_matching_random2d(
    metric: Tensor,
    w: int,
    h: int,
    sx: int,
    sy: int,
    r: int,
    no_rand: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Merge, Unmerge]:
    """One destination in each sx x sy tile, at random or top left; the r most similar other tokens merge into them.

    With a generator in the same state it draws the destinations that tomesd draws.

    Args:
        metric: (B, N, C) tokens to compare, in raster order, N = h * w.
        w: width in tokens.
        h: height in tokens.
        sx: width of a tile.
        sy: height of a tile.
        r: how many tokens merge; more than there are sources merges all of them, and at most 0 none.
        no_rand: the top-left token of each tile instead of a random one.
        generator: needed without `no_rand`; advanced by one `randint`.

    Returns:
        (merge, unmerge): `merge(x, mode="mean")` makes (B, N - r, C') of (B, N, C'), in the order of
        `bigain_kernels.MergePlan`; `unmerge(y)` copies back to all N places.

    Raises:
        TypeError, ValueError: an argument of another type or out of range; `merge` raises them on another mode than
            "mean" and "prune".
    """
    if r <= 0:
        return do_nothing, do_nothing
    destinations = pattern_destinations(metric, (h, w), (sy, sx), None if no_rand else _needed(generator))
    return bipartite_functions(metric, destinations, r, (h, w), (sy, sx))


def _needed(generator: torch.Generator | None) -> torch.Generator:
    if generator is None:
        raise TypeError("generator: got None, expected a torch.Generator, or no_rand=True")
    return generator
