"""The whole of L-GTM around attention (plan, merge, unmerge) against the published algorithm and tomesd.

tomesd has no score to compute: its destinations are the first tokens of the tiles.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

import bigain_kernels as bk
from bigain_kernels import reference
from bigain_kernels.testing import assert_close

from . import harness, published
from .problems import RATIO, SAME_TOKENS, STRIDE, Problem

OP = "lgtm_plan"
SKIP = SAME_TOKENS
TARGETS = {
    "cpu": {
        ("sd2_512", "eager"): 2.2,
        ("sd2_512", "tomesd"): 1.0,
        ("dit_512", "eager"): 3.0,
        ("dit_512", "tomesd"): 1.0,
    }
}


def ours(x: Tensor, problem: Problem) -> Tensor:
    plan = bk.lgtm_plan(x, problem.grid, RATIO, STRIDE)
    return bk.token_unmerge(bk.token_merge(x, plan), plan)


def with_reference(x: Tensor, problem: Problem) -> Tensor:
    plan = reference.lgtm_plan(x, problem.grid, STRIDE, problem.r)
    return reference.token_unmerge(reference.token_merge(x, plan), plan)


def build(problem: Problem, x: Tensor) -> harness.Case:
    def check(provider: str, out: Any) -> None:
        if provider == "eager":
            # In 16 bits its choice of tokens is decided by rounding: float64 shows that the steps are right.
            exact = published.lgtm(x.double(), problem.grid, RATIO, STRIDE)
            assert_close(exact, with_reference(x.double(), problem))
        elif provider == "tomesd":
            assert out.shape == x.shape, "wrong shape"
        else:
            # Every step is checked by its own benchmark; here, that the plan the backend made was carried out.
            backend = "reference" if provider == "compiled" else provider
            with bk.use_backend(backend):
                plan = bk.lgtm_plan(x, problem.grid, RATIO, STRIDE)
            exact = reference.token_unmerge(reference.token_merge(x.double(), plan), plan)
            if provider == "compiled":
                close = (out.double() - exact).abs() <= 0.02 * exact.abs().clamp(min=1)
                assert close.float().mean() > 0.99, "more than ties differ from the reference"
            else:
                assert_close(out, exact, x.dtype)

    providers = {
        **harness.standard(OP, x.device.type, lambda: ours(x, problem), lambda: with_reference(x, problem)),
        "eager": lambda: published.lgtm(x, problem.grid, RATIO, STRIDE),
    }
    if harness.has_tomesd():
        providers["tomesd"] = lambda: published.tomesd_lgtm(x, problem.grid, RATIO, STRIDE)
    left = (problem.tokens - problem.r) / problem.tokens
    sources = problem.tokens - problem.destinations
    # Score and match read the tokens, merge reads them and writes the merged, unmerge reads those and writes tokens.
    data = harness.tokens_bytes(x, 4 + 2 * left)
    return harness.Case(providers, check, data, 2 * problem.batch * sources * problem.destinations * problem.channels)


if __name__ == "__main__":
    sys.exit(harness.main(sys.modules[__name__]))
