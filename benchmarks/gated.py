"""Merging that ranks sources by similarity less a share of their Laplacian score, as a method of `benchmarks.fidelity`.

The abstract of BiGain speaks of "discouraging merges of high-contrast tokens"; the published rule does so by the choice
of destinations alone. Here a source of much contrast stands back in the ranking, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bigain_kernels import MergePlan, bipartite_match, laplacian_score, merge_plan, select_destinations
from bigain_kernels.methods import MergeConfig
from bigain_kernels.methods.options import Choice, Number, option
from bigain_kernels.methods.registry import register
from bigain_kernels.methods.tome import tome_destinations


@register
@dataclass(frozen=True, kw_only=True)
class GatedConfig(MergeConfig):
    """Sources merge in the order of similarity - gate * score / mean score of the row.

    Args:
        gate: share of the score; 1000 ranks by the score alone, since similarities are at most one.
        destinations: "smoothest" of a tile, as L-GTM, or "random", as ToMe.
        others: see `MergeConfig`.
    """

    method: ClassVar[str] = "gated"

    gate: float = option(0.0, Number(0.0))
    destinations: str = option("smoothest", Choice(("smoothest", "random")))

    @property
    def is_random(self) -> bool:
        return self.destinations == "random"

    def plan(self, x: Tensor, grid: tuple[int, int], ratio: float, timestep: Tensor | None = None) -> MergePlan:
        score = laplacian_score(x, grid)
        if self.destinations == "smoothest":
            chosen = select_destinations(score, grid, self.stride)
        else:
            chosen = tome_destinations(x.shape[0], grid, self.stride, "random", 0, timestep, x.device)
        similarity, match = bipartite_match(x, chosen)
        contrast = score / score.mean(dim=1, keepdim=True)
        rank = similarity - self.gate * contrast
        return merge_plan(rank, match, chosen, int(x.shape[1] * ratio), grid)
