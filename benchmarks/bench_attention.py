"""kv_downsample_attention, factor 2, with keys and values given: pooling and attention together.

"pool" pools in one launch and then attends, "fused" is the Triton kernel that pools while it attends; "triton" is one
of the two, by the table of the architecture.

"pooled" is PyTorch's attention on keys and values that are pooled already, the target to come within 5 % of; "full" is
attention over all keys, what an unpatched layer does. Both use the fastest backend of the machine.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

import bigain_kernels as bk
from bigain_kernels import reference

from . import harness
from .problems import ALPHA, FACTOR, Problem
from .sdpa import assert_attention, attend, fastest, split_heads

OP = "kv_downsample_attention"
SKIP = ("alike_4096",)
# The float64 result is computed for so many queries.
CHECKED = 256


def build(problem: Problem, x: Tensor) -> harness.Case:
    grid, pair = problem.grid, (FACTOR, FACTOR)
    keys_in, values_in = x.flip(1), x.flip(0, 1)
    q, k, v = (split_heads(each, problem.heads) for each in (x, keys_in, values_in))

    def pool() -> tuple[Tensor, Tensor]:
        keys, values = bk.kv_downsample((keys_in, values_in), grid, pair, ALPHA)
        return split_heads(keys, problem.heads), split_heads(values, problem.heads)

    pooled_k, pooled_v = pool()
    on_pooled, on_all = fastest(q, pooled_k, pooled_v), fastest(q, k, v)
    few = q[:, :, :CHECKED]
    exact = reference.kv_downsample_attention(few.double(), k.double(), v.double(), grid, pair, ALPHA)
    own = attend(few, pooled_k, pooled_v, [])

    def check(provider: str, out: Any) -> None:
        if provider != "full":
            assert_attention(out[:, :, :CHECKED], exact, own)

    providers = {
        **harness.standard(
            OP,
            x.device.type,
            lambda: bk.kv_downsample_attention(q, k, v, grid, pair, ALPHA),
            lambda: reference.kv_downsample_attention(q, k, v, grid, pair, ALPHA),
        ),
        "pool": lambda: attend(q, *pool(), on_pooled),
        "pooled": lambda: attend(q, pooled_k, pooled_v, on_pooled),
        "full": lambda: attend(q, k, v, on_all),
    }
    if "triton" in providers:
        from bigain_kernels.triton_kernels.kv_downsample_attention import launch_kv_downsample_attention

        providers["fused"] = lambda: launch_kv_downsample_attention(q, k, v, grid, pair, ALPHA)
    keys = pooled_k.shape[2]
    flops = 4 * problem.batch * problem.tokens * keys * problem.channels
    return harness.Case(providers, check, harness.tokens_bytes(x, 4), flops)


if __name__ == "__main__":
    sys.exit(harness.main(sys.modules[__name__]))
