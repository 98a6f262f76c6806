"""MergePlan: which output slot every token goes to, whatever method decided it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.utils._pytree as pytree
from torch import Tensor


@dataclass(frozen=True)
class MergePlan:
    """An immutable description of a merge of N tokens into M slots, for P rows.

    A plan with P rows serves a batch of k * P rows: batch row b uses plan row b mod P. Slots stand in raster order of
    their anchors, so a plan that merges nothing is the identity. Plans are pytrees: they pass through `torch.compile`,
    and one plan can serve several layers of the same resolution.

    Attributes:
        slot: (P, N) int32, the slot of each token; unmerging is `out[b, n] = y[b, slot[b, n]]`.
        offsets: (P, M + 1) int32; slot m holds `members[offsets[m] : offsets[m + 1]]`.
        members: (P, N) int32, token indices grouped by slot, ascending inside a slot.
        anchor: (P, M) int32, the token that represents the slot: the destination, or the unmerged token itself.
        grid: (H, W) with N = H * W; token n = row * W + column.
        num_slots: M.
    """

    slot: Tensor
    offsets: Tensor
    members: Tensor
    anchor: Tensor
    grid: tuple[int, int]
    num_slots: int

    def __repr__(self) -> str:
        # As a pytree it may hold anything in the place of its tensors.
        slot = self.slot
        rows = f"{slot.shape[0]} row{'s' * (slot.shape[0] != 1)}, " if isinstance(slot, Tensor) else ""
        where = f", {slot.device}" if isinstance(slot, Tensor) else ""
        return (
            f"MergePlan({rows}{self.grid[0] * self.grid[1]} tokens to {self.num_slots} slots, grid {self.grid}{where})"
        )

    @property
    def num_rows(self) -> int:
        """P, the number of rows planned for."""
        return self.slot.shape[0]

    @property
    def num_tokens(self) -> int:
        """N, the number of tokens before merging."""
        return self.slot.shape[1]

    @property
    def r(self) -> int:
        """N - M, the number of tokens that merging removes."""
        return self.num_tokens - self.num_slots

    def sizes(self) -> Tensor:
        """Number of tokens in each slot, (P, M) int32; each row sums to N."""
        return self.offsets[:, 1:] - self.offsets[:, :-1]

    def assign(self) -> Tensor:
        """The token that represents each token, (P, N) int64: itself, or the destination it was merged into."""
        return self.anchor.long().gather(1, self.slot.long())

    def to(self, device: torch.device | str) -> MergePlan:
        """The same plan with its tensors on `device`."""
        return MergePlan(
            self.slot.to(device),
            self.offsets.to(device),
            self.members.to(device),
            self.anchor.to(device),
            self.grid,
            self.num_slots,
        )

    @staticmethod
    def identity(rows: int, grid: tuple[int, int], device: torch.device | str | None = None) -> MergePlan:
        """The plan for `rows` rows that merges nothing on an (H, W) grid."""
        n = grid[0] * grid[1]
        tokens = torch.arange(n, dtype=torch.int32, device=device).repeat(rows, 1)
        offsets = torch.arange(n + 1, dtype=torch.int32, device=device).repeat(rows, 1)
        return MergePlan(tokens, offsets, tokens.clone(), tokens.clone(), grid, n)


pytree.register_pytree_node(
    MergePlan,
    lambda plan: ([plan.slot, plan.offsets, plan.members, plan.anchor], (plan.grid, plan.num_slots)),
    lambda tensors, context: MergePlan(*tensors, *context),
    serialized_type_name=f"{__name__.split('.')[0]}.MergePlan",
    to_dumpable_context=lambda context: [list(context[0]), context[1]],
    from_dumpable_context=lambda context: (tuple(context[0]), context[1]),
)
