"""Op `bigain::merge_plan`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_count, check_grid, check_same_device, check_tensor
from ..declaration import Op, count, tensor
from ..plan import MergePlan
from ._flops import none
from ._library import define
from ._shapes import PLAN, fake_tables

# The tables do not depend on the grid, which the public function adds to the plan.
OP = Op(
    "merge_plan",
    (tensor("similarity"), tensor("match"), tensor("destinations"), count("r")),
    PLAN,
    fake=lambda similarity, match, destinations, r: fake_tables(similarity, similarity.shape[1] - r),
    flops=none,
    samples=lambda s: {"": (s.similarity, s.match, s.destinations, s.r)},
    selects=True,
)
_call = define(OP)


def merge_plan(similarity: Tensor, match: Tensor, destinations: Tensor, r: int, grid: tuple[int, int]) -> MergePlan:
    """The plan that merges the r best-matched sources into their destinations.

    Sources of the highest similarity merge; ties go to the lowest token index, NaN counts as -inf. r is clipped to the
    number of sources, N - D.

    Args:
        similarity: (B, N) float32, as `bipartite_match` returns it.
        match: (B, N) int32, token index of each source's destination.
        destinations: (B, D) int32 token indices, distinct in each row.
        r: how many sources merge, at least 0.
        grid: (H, W) with H * W = N.

    Returns:
        MergePlan with B rows and M = N - min(r, N - D) slots.

    Raises:
        TypeError, ValueError: wrong type, dtype, rank, device, shape, r or grid.
    """
    check_tensor("similarity", similarity, 2, (torch.float32,))
    check_tensor("match", match, 2, (torch.int32,))
    check_tensor("destinations", destinations, 2, (torch.int32,))
    height, width = check_grid(grid, similarity.shape[1], "similarity")
    if match.shape != similarity.shape:
        raise ValueError(
            f"match: got shape {tuple(match.shape)}, expected {tuple(similarity.shape)}, that of similarity"
        )
    n, d = similarity.shape[1], destinations.shape[1]
    if destinations.shape[0] != similarity.shape[0] or d > n:
        raise ValueError(
            f"destinations: got shape {tuple(destinations.shape)}, expected ({similarity.shape[0]}, D) with D <= {n}"
        )
    check_same_device(similarity=similarity, match=match, destinations=destinations)
    r = check_count("r", r)
    r = min(r, n - d) if d else 0
    slot, offsets, members, anchor = _call(similarity, match, destinations, r)
    return MergePlan(slot, offsets, members, anchor, (height, width), n - r)
