"""Plans as the pairs of functions that tomesd and the code that came from it pass around."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..checks import check_choice
from ..methods._common import match_and_plan
from ..ops import token_merge, token_unmerge
from ..plan import MergePlan
from .published import published_mlerp

Merge = Callable[..., Tensor]
Unmerge = Callable[..., Tensor]


def do_nothing(x: Tensor, mode: str | None = None) -> Tensor:
    """x itself: merge and unmerge where nothing merges."""
    return x


def plan_functions(
    plan: MergePlan, modes: tuple[str, ...] = ("mean", "prune"), own_mlerp: bool = False
) -> tuple[Merge, Unmerge]:
    """(merge, unmerge) of a plan; modes are those of `token_merge`, "mlerp" without `own_mlerp` `published_mlerp`."""

    def merge(x: Tensor, mode: str = "mean") -> Tensor:
        check_choice("mode", mode, modes)
        published = mode == "mlerp" and not own_mlerp
        return published_mlerp(x, plan) if published else token_merge(x, plan, mode=mode)

    def unmerge(x: Tensor, mode: str | None = None) -> Tensor:
        return token_unmerge(x, plan)

    return merge, unmerge


def bipartite_functions(
    metric: Tensor,
    destinations: Tensor,
    r: int,
    grid: tuple[int, int],
    stride: tuple[int, int],
    modes: tuple[str, ...] = ("mean", "prune"),
) -> tuple[Merge, Unmerge]:
    """(merge, unmerge) of r tokens, or all sources where r is more, into `destinations`, (B, D) int32."""
    most = metric.shape[1] - destinations.shape[1]
    return plan_functions(match_and_plan(metric, destinations, min(r, most), grid, stride, None), modes)
