from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from bigain_kernels import reference
from bigain_kernels.triton_kernels.bipartite_match import launch_bipartite_match
from bigain_kernels.triton_kernels.block_merge_plan import launch_block_merge_plan
from bigain_kernels.triton_kernels.kv_downsample import launch_kv_downsample
from bigain_kernels.triton_kernels.kv_downsample_attention import launch_kv_downsample_attention
from bigain_kernels.triton_kernels.laplacian_score import (
    launch_laplacian_score,
    launch_score_and_select,
)
from bigain_kernels.triton_kernels.lgtm_plan import launch_lgtm_plan
from bigain_kernels.triton_kernels.merge_plan import launch_merge_plan
from bigain_kernels.triton_kernels.pooled_kv_projection import launch_pooled_kv_projection
from bigain_kernels.triton_kernels.select_destinations import launch_select_destinations
from bigain_kernels.triton_kernels.token_merge import launch_token_merge
from bigain_kernels.triton_kernels.token_merge_norm import launch_token_merge_norm
from bigain_kernels.triton_kernels.token_unmerge import launch_token_unmerge
from tests.contract.inputs import odd_tokens, random_match

from .check_token_merge import plan_of_sizes, random_plan
from .inputs import CASES, IDS, INTERPRETED, ON_GPU

pytestmark = pytest.mark.skipif(ON_GPU, reason="compute-sanitizer looks for races on a GPU")
if INTERPRETED:
    from .races import watch

CHUNKS = [{"BLOCK": 64, "TOKENS": 32, "PARTS": 3, "HISTOGRAM": each, "num_warps": 1} for each in (True, False)]
MATCH = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2}


@pytest.mark.parametrize(("batch", "grid", "stride", "channels", "strided"), CASES[:8], ids=IDS[:8])
def test_planning(monkeypatch, batch, grid, stride, channels, strided):
    n = grid[0] * grid[1]
    x = odd_tokens(2 * batch, n, channels, torch.float32, strided)
    with watch(monkeypatch):
        score = launch_laplacian_score(x, grid)
        destinations = launch_select_destinations(score, grid, stride)
        for share in (1, 2):
            launch_score_and_select(x, grid, stride, share)
        for split in (1, 2):
            launch_bipartite_match(x, destinations, config={**MATCH, "SPLIT": split})
            launch_bipartite_match(x.bfloat16(), destinations, config={**MATCH, "SPLIT": split, "KEEP": True})
        launch_bipartite_match(x, destinations, 2, grid, stride, MATCH)
        launch_bipartite_match(x, destinations, 1, grid, stride)
        for window in (None, 1):
            launch_lgtm_plan(x, grid, stride, (n - destinations.shape[1]) // 2 if destinations.numel() else 0, window)


@pytest.mark.parametrize("config", [None, *CHUNKS], ids=["default", "many chunks", "many chunks, no histogram"])
@pytest.mark.parametrize("n", [1, 50, 300])
def test_tables(monkeypatch, n, config):
    inputs = random_match(2, n, max(n // 4, 1), n, "ties")
    with watch(monkeypatch):
        for r in {0, n // 2, n - max(n // 4, 1)}:
            launch_merge_plan(*inputs, min(r, n - inputs[2].shape[1]), config)
        if n == 300:
            launch_block_merge_plan(inputs[0], (15, 20), (2, 3), 100, "std", config)


@pytest.mark.parametrize("mode", ["mean", "mlerp", "prune"])
def test_moving(monkeypatch, mode):
    for plan, batch in ((random_plan(2, 63), 4), (plan_of_sizes([600, 2, 300, 40, 1]), 1)):
        x = odd_tokens(batch, plan.num_tokens, 72, torch.bfloat16, strided=True)
        tables = (plan.slot, plan.offsets, plan.members, plan.anchor)
        rows = x[:, 0]
        with watch(monkeypatch):
            y = launch_token_merge(x, *tables, mode)
            launch_token_unmerge(y, *tables, x, rows)
            if mode == "mean":
                launch_token_merge_norm(x, *tables, norm_weight=rows[0], norm_bias=rows[0], scale=rows, shift=rows)


@pytest.mark.parametrize(("grid", "factor"), [((7, 9), (2, 2)), ((11, 11), (5, 5)), ((1, 1), (1, 1))])
def test_pooling(monkeypatch, grid, factor):
    xs = [odd_tokens(2, grid[0] * grid[1], channels, torch.float16, strided=True) for channels in (72, 8, 64)]
    with watch(monkeypatch):
        for alpha in (0.0, 1.0, 0.9, torch.tensor([1.0, 0.5])):
            launch_kv_downsample(xs, grid, factor, alpha)


@pytest.mark.parametrize(("grid", "factor"), [((7, 9), (2, 2)), ((4, 5), (1, 1))])
def test_attention(monkeypatch, grid, factor):
    n = grid[0] * grid[1]
    x = odd_tokens(2, n + 3, 3 * 2 * 24, torch.bfloat16, strided=True).nan_to_num(1.0, 1.0)
    q, k, v = (t.unflatten(2, (2, 24)).transpose(1, 2) for t in x.chunk(3, dim=2))
    keys = (grid[0] // factor[0]) * (grid[1] // factor[1]) + 3
    with watch(monkeypatch):
        for alpha in (1.0, torch.tensor([0.0, 0.7])):
            launch_kv_downsample_attention(q, k, v, grid, factor, alpha, None, x[:, 0, :keys], (2, n + 2))


@pytest.mark.parametrize("alpha", [1.0, 0.9])
def test_projection(monkeypatch, alpha):
    x = odd_tokens(2, 63, 72, torch.float16, strided=True)
    weight = odd_tokens(1, 40, 72, torch.float16)[0]
    with watch(monkeypatch):
        launch_pooled_kv_projection(x, (7, 9), (2, 2), alpha, weight, weight[:24], weight[:, 0].contiguous(), None)


def test_the_barriers_of_planning_are_needed(monkeypatch):
    """Were they not there, this would be seen: so the tests above say something."""
    inputs = random_match(1, 300, 75)
    with pytest.raises(AssertionError, match="no barrier between"), watch(monkeypatch, barriers=False):
        launch_merge_plan(*inputs, 100)
    assert torch.equal(launch_merge_plan(*inputs, 100)[0], reference.merge_plan(*inputs, 100, (1, 300)).slot)


@triton.jit
def _neighbour_kernel(p_x, p_y, n, BARRIER: tl.constexpr):
    o_n = tl.arange(0, 16)
    tl.store(p_y + o_n, tl.load(p_x + o_n, mask=o_n < n), mask=o_n < n)
    if BARRIER:
        tl.debug_barrier()
    tl.store(p_x + o_n, tl.load(p_y + n - 1 - o_n, mask=o_n < n), mask=o_n < n)


@triton.jit
def _everyone_kernel(p_x, ATOMIC: tl.constexpr):
    if ATOMIC:
        tl.atomic_max(p_x + tl.arange(0, 4), tl.arange(0, 4))
    else:
        tl.store(p_x + tl.arange(0, 4), tl.arange(0, 4))


def test_what_is_looked_for_is_found(monkeypatch):
    x = torch.arange(40, dtype=torch.int32)
    with watch(monkeypatch):
        _neighbour_kernel[(1,)](x[:10], x[20:30], 10, True)
        _everyone_kernel[(1,)](x, False)
        _everyone_kernel[(2,)](x, True)
    with pytest.raises(AssertionError, match=r"no barrier between .* address \d+ of \['p_y'\]"), watch(monkeypatch):
        _neighbour_kernel[(1,)](x[:10], x[20:30], 10, False)
    with pytest.raises(AssertionError, match=r"two programs race for address \d+ of \['p_x'\]"), watch(monkeypatch):
        _everyone_kernel[(2,)](x, False)
    with pytest.raises(AssertionError, match="1 addresses outside of all tensors"), watch(monkeypatch):
        _everyone_kernel[(1,)](x[:3], False)
