"""laplacian_score against the depthwise convolution of the published code.

"conv2d" convolves a contiguous image, "eager" the channels-last view that the published code hands over.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

import bigain_kernels as bk
from bigain_kernels import reference
from bigain_kernels.testing import assert_close

from . import harness, published
from .problems import SAME_TOKENS, Problem

OP = "laplacian_score"
SKIP = SAME_TOKENS
TARGETS = {"cpu": {("sd2_512", "conv2d"): 8.0, ("dit_512", "conv2d"): 8.0}}


def build(problem: Problem, x: Tensor) -> harness.Case:
    grid = problem.grid
    expected = reference.laplacian_score(x.double(), grid)

    def check(provider: str, score: Any) -> None:
        if provider in ("eager", "conv2d"):
            # In 16 bits it rounds every response: float64 shows that the steps are right.
            score = published.laplacian_score(x.double(), grid, contiguous=provider == "conv2d").float()
        assert_close(score, expected, torch.float32)

    providers = {
        **harness.standard(
            OP, x.device.type, lambda: bk.laplacian_score(x, grid), lambda: reference.laplacian_score(x, grid)
        ),
        "eager": lambda: published.laplacian_score(x, grid),
        "conv2d": lambda: published.laplacian_score(x, grid, contiguous=True),
    }
    return harness.Case(providers, check, harness.tokens_bytes(x) + 4 * problem.batch * problem.tokens)


if __name__ == "__main__":
    sys.exit(harness.main(sys.modules[__name__]))
