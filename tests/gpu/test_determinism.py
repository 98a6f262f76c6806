"""The same bits every time: in a second run, and alone or beside other rows."""

from __future__ import annotations

import pytest
import torch

import bigain_kernels as bk

from .device import BACKENDS, DEVICE, DTYPES, random_tokens

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
GRID = (32, 32)


def leaves(value):
    return torch.utils._pytree.tree_leaves(value)


def everything(x, y, alpha, weights):
    """All that the ops make of tokens x (B, 1024, C), slots y, and numbers per row."""
    score = bk.laplacian_score(x, GRID)
    destinations = bk.select_destinations(score, GRID, (2, 2))
    plan = bk.lgtm_plan(x, GRID, 0.7)
    near = bk.lgtm_plan(x, GRID, 0.7, window=1)
    blocks = bk.block_merge_plan(score, GRID, (2, 2), 600, "mean")
    return [
        score,
        destinations,
        *bk.bipartite_match(x, destinations),
        *leaves((plan, near, blocks)),
        *(bk.token_merge(x, p, mode) for p in (plan, blocks) for mode in ("mean", "mlerp", "prune")),
        bk.token_merge(x, plan, "mean", weights),
        bk.token_merge(x, plan, norm_eps=1e-5, scale=x[:, 0], shift=x[:, 1]),
        bk.token_unmerge(y[:, : plan.num_slots], plan, x, x[:, 0]),
        bk.kv_downsample(x, GRID, 2, alpha),
        *bk.kv_downsample((x, y), GRID, (3, 2), 0.9),
    ]


def inputs(batch, dtype):
    x, y = (random_tokens(batch, 1024, 320, dtype, seed) for seed in (0, 1))
    x[-1, 1:900] = x[-1, 0]  # a slot with hundreds of members
    numbers = torch.rand(batch, 1025, generator=torch.Generator(DEVICE).manual_seed(2), device=DEVICE) + 0.5
    return x, y, numbers[:, 0].contiguous(), numbers[:, 1:].contiguous()


def assert_same_bits(left, right):
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs(backend, dtype):
    args = inputs(4, dtype)
    with bk.use_backend(backend):
        first = everything(*args)
        for _ in range(3):
            assert_same_bits(everything(*args), first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_and_in_a_batch(backend, dtype):
    args = inputs(5, dtype)
    with bk.use_backend(backend):
        together = everything(*args)
        for row in range(5):
            alone = everything(*(t[row : row + 1] for t in args))
            assert_same_bits([t[0] for t in alone], [t[row] for t in together])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_change_nothing(backend, dtype):
    args = inputs(2, dtype)
    wide = torch.zeros(2, 1030, 384, dtype=dtype, device=DEVICE)
    wide[:, 3:1027, 16:336] = args[0]
    with bk.use_backend(backend):
        assert_same_bits(everything(wide[:, 3:1027, 16:336], *args[1:]), everything(*args))
