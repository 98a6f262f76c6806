"""merge_plan: the r best-matched sources and the tables of the plan, against the argsort of the published code.

The published step ends with index lists; the sorting of its sources from its destinations is part of its match.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

import bigain_kernels as bk
from bigain_kernels import reference

from . import harness, published
from .problems import SAME_TOKENS, STRIDE, Problem

OP = "merge_plan"
SKIP = SAME_TOKENS


def build(problem: Problem, x: Tensor) -> harness.Case:
    grid, r = problem.grid, problem.r
    destinations = bk.select_destinations(bk.laplacian_score(x, grid), grid, STRIDE)
    similarity, match = bk.bipartite_match(x, destinations)
    matched = published.match(x, destinations.long())
    expected = reference.merge_plan(similarity, match, destinations, r, grid)

    def check(provider: str, plan: Any) -> None:
        if provider == "eager":
            assert plan.merged.shape[1] == r
            assert (plan.match.similarity.gather(1, plan.merged[..., 0]).diff(dim=1) <= 0).all(), "not the best first"
            return
        for name in ("slot", "offsets", "members", "anchor"):
            assert torch.equal(getattr(plan, name), getattr(expected, name)), f"{name} differs"

    providers = {
        **harness.standard(
            OP,
            x.device.type,
            lambda: bk.merge_plan(similarity, match, destinations, r, grid),
            lambda: reference.merge_plan(similarity, match, destinations, r, grid),
        ),
        "eager": lambda: published.merge_plan(matched, r),
    }
    # In: similarity, match. Out: slot, members, offsets, anchor. All of 4 bytes.
    values = 4 * problem.tokens + 2 * (problem.tokens - r) + problem.destinations
    return harness.Case(providers, check, 4 * problem.batch * values)


if __name__ == "__main__":
    sys.exit(harness.main(sys.modules[__name__]))
