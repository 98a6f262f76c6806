"""bipartite_match against the whole similarity matrix of the published code.

"bmm" is what PyTorch cannot do without: the product of sources and destinations that are gathered and normalized
already, in the dtype of the tokens, and its maximum.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

import bigain_kernels as bk
from bigain_kernels import reference
from bigain_kernels.testing import assert_match_is_best

from . import harness, published
from .problems import SAME_TOKENS, STRIDE, Problem

OP = "bipartite_match"
SKIP = SAME_TOKENS
TARGETS = {"cpu": {("sd2_512", "bmm"): 1.0, ("dit_512", "bmm"): 1.0}}


def build(problem: Problem, x: Tensor) -> harness.Case:
    destinations = bk.select_destinations(bk.laplacian_score(x, problem.grid), problem.grid, STRIDE)
    index = destinations.long()
    gathered = published.gathered(x, index)

    def check(provider: str, result: Any) -> None:
        if provider == "bmm":
            assert result[1].shape == (problem.batch, problem.tokens - problem.destinations), "wrong shape"
            return
        if provider != "eager":
            assert_match_is_best(x, destinations, *result)
            return
        # In 16 bits the published ranking is decided by rounding, so its steps are checked in float64.
        matched = published.match(x.double(), index)
        similarity, match = reference.bipartite_match(x.double(), destinations)
        sources = matched.sources[..., 0]
        assert similarity.gather(1, sources).sub(matched.similarity.float()).abs().max() < 1e-6, "similarities differ"
        found = matched.destinations[..., 0].gather(1, matched.position)
        if not problem.alike:  # its maximum takes any of equal destinations
            assert (found == match.gather(1, sources)).float().mean() > 0.999, "matches differ"

    providers = {
        **harness.standard(
            OP,
            x.device.type,
            lambda: bk.bipartite_match(x, destinations),
            lambda: reference.bipartite_match(x, destinations),
        ),
        "eager": lambda: published.match(x, index),
        "bmm": lambda: torch.bmm(*gathered).max(dim=-1),
    }
    sources = problem.tokens - problem.destinations
    flops = 2 * problem.batch * sources * problem.destinations * problem.channels
    return harness.Case(providers, check, harness.tokens_bytes(x) + 8 * problem.batch * problem.tokens, flops)


if __name__ == "__main__":
    sys.exit(harness.main(sys.modules[__name__]))
