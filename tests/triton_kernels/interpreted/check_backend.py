"""The public ops on the Triton kernels, by the ordinary route."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_leaves

import bigain_kernels as bk
from bigain_kernels import backends
from tests.contract.inputs import odd_tokens

from .inputs import DEVICE, ON_GPU

GRID = (4, 6)


def layer(x):
    """A call of every op."""
    score = bk.laplacian_score(x, GRID)
    destinations = bk.select_destinations(score, GRID, (2, 2))
    similarity, match = bk.bipartite_match(x, destinations)
    plan = bk.merge_plan(similarity, match, destinations, 9, GRID)
    q = x.unflatten(2, (2, -1)).transpose(1, 2)
    return (
        bk.block_merge_plan(score, GRID, (2, 2), 9),
        bk.lgtm_plan(x, GRID, 0.4, window=1),
        bk.token_unmerge(bk.token_merge(x, plan), plan, residual=x),
        bk.token_merge(x, plan, norm_eps=1e-5),
        bk.kv_downsample((x, x), GRID, 2, 0.9),
        bk.kv_downsample_attention(q, q, q, GRID, 2, 0.9),
        bk.pooled_kv_projection(x, GRID, 2, 0.9, x[0, :8], x[0, :4]),
    )


def test_every_op_takes_the_ordinary_route(monkeypatch):
    x = odd_tokens(2, 24, 64, torch.float32)[:, :, :32].to(DEVICE)
    x = torch.nan_to_num(x, posinf=0.0)
    monkeypatch.setenv("BIGAIN_BACKEND", "triton")
    results = layer(x)
    monkeypatch.setenv("BIGAIN_BACKEND", "reference")
    for result, expected in zip(tree_leaves(results), tree_leaves(layer(x)), strict=True):
        if result.dtype == torch.int32:
            assert torch.equal(result, expected)
        else:
            torch.testing.assert_close(result, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.skipif(ON_GPU, reason="a GPU prefers it to the reference")
def test_the_interpreter_runs_only_when_it_is_asked_for():
    for device in ("cpu", "cuda"):
        assert backends.choose("laplacian_score", device).backend != "triton"
        with bk.use_backend("triton"):
            assert backends.choose("laplacian_score", device).backend == "triton"
