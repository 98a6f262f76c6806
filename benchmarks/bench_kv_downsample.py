"""kv_downsample of keys and values, factor 2, against interpolate and avg_pool2d."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

import bigain_kernels as bk
from bigain_kernels import reference
from bigain_kernels.testing import assert_close

from . import harness, published
from .problems import ALPHA, FACTOR, Problem

OP = "kv_downsample"
SKIP = ("sd15_512", "alike_4096")
TARGETS = {"cpu": {("sd2_512", "eager"): 2.0, ("dit_512", "eager"): 2.0}}


def build(problem: Problem, x: Tensor) -> harness.Case:
    grid, pair = problem.grid, (x, x.flip(1))
    expected = reference.kv_downsample([each.double() for each in pair], grid, (FACTOR, FACTOR), ALPHA)

    def check(provider: str, pooled: Any) -> None:
        for each, exact in zip(pooled, expected, strict=True):
            if provider == "eager":
                # It rounds the average, both products and their sum: up to four times half a unit in the last place.
                error = (each.double() - exact).abs().max()
                assert error <= 4 * exact.abs().max() * 2.0**-8 if x.element_size() == 2 else error < 1e-4
            else:
                assert_close(each, exact, x.dtype)

    providers = {
        **harness.standard(
            OP,
            x.device.type,
            lambda: bk.kv_downsample(pair, grid, FACTOR, ALPHA),
            lambda: reference.kv_downsample(pair, grid, (FACTOR, FACTOR), ALPHA),
        ),
        "eager": lambda: [published.kv_downsample(each, grid, FACTOR, ALPHA) for each in pair],
    }
    return harness.Case(providers, check, harness.tokens_bytes(x, 2 * (1 + 1 / FACTOR**2)))


if __name__ == "__main__":
    sys.exit(harness.main(sys.modules[__name__]))
