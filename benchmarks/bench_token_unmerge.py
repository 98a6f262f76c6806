"""token_unmerge with gate and residual, which the published code multiplies and adds afterwards."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

import bigain_kernels as bk
from bigain_kernels import reference
from bigain_kernels.testing import assert_close

from . import harness, published
from .problems import RATIO, SAME_TOKENS, STRIDE, Problem

OP = "token_unmerge"
SKIP = SAME_TOKENS


def build(problem: Problem, x: Tensor) -> harness.Case:
    plan = bk.lgtm_plan(x, problem.grid, RATIO, STRIDE)
    published_plan = published.lgtm_plan(x, problem.grid, RATIO, STRIDE)
    y, published_y = bk.token_merge(x, plan), published.token_merge(x, published_plan)
    gate = torch.randn(problem.batch, problem.channels, device=x.device).to(x.dtype)
    expected = reference.token_unmerge(y.double(), plan, x.double(), gate.double())

    def check(provider: str, out: Any) -> None:
        if provider != "eager":
            assert_close(out, expected, x.dtype)
            return
        # Which tokens merge may differ in 16 bits: in float64 the values that come back must be ours.
        exact = published.lgtm(x.double(), problem.grid, RATIO, STRIDE)
        ours = bk.lgtm_plan(x.double(), problem.grid, RATIO, STRIDE)
        assert_close(exact, reference.token_unmerge(reference.token_merge(x.double(), ours), ours))
        assert out.shape == expected.shape

    providers = {
        **harness.standard(
            OP,
            x.device.type,
            lambda: bk.token_unmerge(y, plan, residual=x, gate=gate),
            lambda: reference.token_unmerge(y, plan, x, gate),
        ),
        "eager": lambda: gate[:, None] * published.token_unmerge(published_y, published_plan) + x,
    }
    left = (problem.tokens - problem.r) / problem.tokens
    return harness.Case(providers, check, harness.tokens_bytes(x, 2 + left))


if __name__ == "__main__":
    sys.exit(harness.main(sys.modules[__name__]))
