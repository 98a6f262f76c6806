"""A whole self-attention layer, projections included: hidden states in, output projection out.

"unpatched" attends to all tokens; "eager" is ToDo as published (keys and values projected from hidden states reduced
by nearest interpolation); "pool" pools with kv_downsample and then projects; our backends use pooled_kv_projection,
and "fused" is its Triton kernel that pools while it projects.
PyTorch's attention uses the fastest backend of the machine everywhere.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bigain_kernels as bk
from bigain_kernels import reference

from . import harness, published
from .problems import ALPHA, FACTOR, Problem
from .sdpa import assert_attention, attend, fastest, split_heads

OP = "pooled_kv_projection"
SKIP = ("alike_4096",)
CHECKED = 256


def build(problem: Problem, x: Tensor) -> harness.Case:
    grid, pair, channels = problem.grid, (FACTOR, FACTOR), problem.channels
    generator = torch.Generator(x.device).manual_seed(1)

    def weight() -> Tensor:
        scale = channels**-0.5
        return (torch.randn(channels, channels, generator=generator, device=x.device) * scale).to(x.dtype)

    w_q, w_k, w_v, w_out = (weight() for _ in range(4))
    tokens = problem.tokens
    shape = (problem.batch, problem.heads, tokens, channels // problem.heads)
    sample = x.new_empty(shape).normal_()
    on_pooled = fastest(sample, sample[:, :, : tokens // FACTOR**2], sample[:, :, : tokens // FACTOR**2])
    on_all = fastest(sample, sample, sample)

    def layer(k: Tensor, v: Tensor, backends: Any, queries: Tensor = x) -> Tensor:
        q = F.linear(queries, w_q.to(queries.dtype))
        q, k, v = (split_heads(each, problem.heads) for each in (q, k, v))
        return F.linear(attend(q, k, v, backends).transpose(1, 2).flatten(2), w_out.to(queries.dtype))

    def from_pooled(pooled: Tensor) -> Tensor:
        return layer(F.linear(pooled, w_k), F.linear(pooled, w_v), on_pooled)

    def with_reference() -> Tensor:
        k, v = reference.pooled_kv_projection(x, grid, pair, ALPHA, w_k, w_v)
        return layer(k, v, [])

    def exact_with(alpha: float) -> Tensor:
        k, v = reference.pooled_kv_projection(x.double(), grid, pair, alpha, w_k.double(), w_v.double())
        return layer(k, v, [], x[:, :CHECKED].double())

    exact = {alpha: exact_with(alpha) for alpha in (ALPHA, 1.0)}
    own = with_reference()[:, :CHECKED]

    def check(provider: str, out: Any) -> None:
        if provider == "eager":
            assert_attention(
                out[:, :CHECKED], exact[1.0], from_pooled(bk.kv_downsample(x, grid, pair, 1.0))[:, :CHECKED]
            )
        elif provider != "unpatched":
            assert_attention(out[:, :CHECKED], exact[ALPHA], own)

    providers = {
        **harness.standard(
            OP,
            x.device.type,
            lambda: layer(*bk.pooled_kv_projection(x, grid, pair, ALPHA, w_k, w_v), on_pooled),
            with_reference,
        ),
        "pool": lambda: from_pooled(bk.kv_downsample(x, grid, pair, ALPHA)),
        "eager": lambda: from_pooled(published.todo_downsample(x, grid, FACTOR)),
        "unpatched": lambda: layer(F.linear(x, w_k), F.linear(x, w_v), on_all),
    }
    if "triton" in providers:
        from bigain_kernels.triton_kernels.pooled_kv_projection import launch_pooled_kv_projection

        def fused() -> Tensor:
            k, v = launch_pooled_kv_projection(x, grid, pair, ALPHA, w_k, w_v)
            return layer(k, v, on_pooled)

        providers["fused"] = fused
    keys = tokens // FACTOR**2
    flops = problem.batch * channels * (4 * tokens * channels + 4 * keys * channels + 4 * tokens * keys)
    return harness.Case(providers, check, harness.tokens_bytes(x, 2) + 4 * w_q.numel() * w_q.element_size(), flops)


if __name__ == "__main__":
    sys.exit(harness.main(sys.modules[__name__]))
