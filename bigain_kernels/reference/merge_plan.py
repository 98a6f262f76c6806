"""From matches to a MergePlan."""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan import MergePlan


def plan_from_assignment(assign: Tensor, num_slots: int, grid: tuple[int, int]) -> MergePlan:
    """The plan in which token n is represented by token assign[b, n]; assign is (B, N) int64, assign[assign] = assign.

    `num_slots` is the number of tokens that represent themselves; it is passed in so that no shape depends on data.
    """
    batch, n = assign.shape
    tokens = torch.arange(n, device=assign.device)
    is_anchor = assign == tokens
    slot_of_anchor = is_anchor.cumsum(1) - 1
    slot = slot_of_anchor.gather(1, assign)
    # Stable sorts of the flags and of the slots list tokens in ascending order inside each group.
    anchor = (~is_anchor).byte().argsort(dim=1, stable=True)[:, :num_slots]
    members = slot.argsort(dim=1, stable=True)
    sizes = torch.zeros((batch, num_slots), dtype=torch.int64, device=assign.device)
    sizes.scatter_add_(1, slot, torch.ones_like(slot))
    offsets = torch.nn.functional.pad(sizes.cumsum(1), (1, 0))
    return MergePlan(slot.int(), offsets.int(), members.int(), anchor.int(), grid, num_slots)


def merge_plan(
    similarity: Tensor, match: Tensor, destinations: Tensor, r: int, grid: tuple[int, int] | None = None
) -> MergePlan:
    """The r sources of highest similarity merge into their matches; ties to the lowest token index.

    A plan without a grid gets (1, N): its tables do not depend on it.
    """
    batch, n = similarity.shape
    tokens = torch.arange(n, device=similarity.device).expand(batch, n)
    is_destination = torch.zeros((batch, n), dtype=torch.bool, device=similarity.device)
    is_destination.scatter_(1, destinations.long(), True)
    usable = similarity.masked_fill(similarity.isnan(), -torch.inf)
    # Two stable sorts: by similarity, then sources before destinations (a source may have -inf as well).
    order = usable.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, is_destination.gather(1, order).byte().argsort(dim=1, stable=True))
    merged = order[:, :r]
    assign = tokens.scatter(1, merged, match.long().gather(1, merged))
    return plan_from_assignment(assign, n - r, grid or (1, n))
