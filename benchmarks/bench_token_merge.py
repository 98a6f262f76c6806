"""token_merge (mean) against the gathers and scatter_reduce of the published code."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

import bigain_kernels as bk
from bigain_kernels import reference
from bigain_kernels.testing import assert_close

from . import harness, published
from .problems import RATIO, SAME_TOKENS, STRIDE, Problem

OP = "token_merge"
SKIP = SAME_TOKENS


def build(problem: Problem, x: Tensor) -> harness.Case:
    plan = bk.lgtm_plan(x, problem.grid, RATIO, STRIDE)
    published_plan = published.lgtm_plan(x, problem.grid, RATIO, STRIDE)
    expected = reference.token_merge(x.double(), plan)

    def check(provider: str, merged: Any) -> None:
        if provider != "eager":
            assert_close(merged, expected, x.dtype)
            return
        # Its order of slots differs, and in 16 bits its sums are rounded at every addition: float64 shows the steps.
        exact = published.token_merge(x.double(), published_plan)
        rows = published.lgtm_plan(x.double(), problem.grid, RATIO, STRIDE)
        ours = reference.token_merge(x.double(), bk.lgtm_plan(x.double(), problem.grid, RATIO, STRIDE))
        total = published.token_merge(x.double(), rows).sum(1)
        assert_close(total, ours.sum(1))
        assert exact.shape == merged.shape

    providers = {
        **harness.standard(OP, x.device.type, lambda: bk.token_merge(x, plan), lambda: reference.token_merge(x, plan)),
        "eager": lambda: published.token_merge(x, published_plan),
    }
    left = (problem.tokens - problem.r) / problem.tokens
    return harness.Case(providers, check, harness.tokens_bytes(x, 1 + left))


if __name__ == "__main__":
    sys.exit(harness.main(sys.modules[__name__]))
