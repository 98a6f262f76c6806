"""More than 2^31 elements in one tensor: offsets of 32 bits would wrap around."""

from __future__ import annotations

import pytest
import torch

import bigain_kernels as bk
from bigain_kernels.testing import assert_close

from .device import BACKENDS, DEVICE, free_bytes

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
GRID, CHANNELS = (128, 128), 1024
N = GRID[0] * GRID[1]
BATCH = 2**31 // (N * CHANNELS) + 2  # 130 rows of 16.8 million elements: 4.4 GB


@pytest.fixture
def x():
    """Tokens whose first and last rows are different, and the rest zero; freed after the test."""
    needed = 2.6 * BATCH * N * CHANNELS * 2
    if free_bytes() < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free memory, {free_bytes() / 2**30:.0f} are there")
    big = torch.zeros(BATCH, N, CHANNELS, dtype=torch.bfloat16, device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for row in (0, BATCH // 2, BATCH - 1):
        big[row] = torch.randn(N, CHANNELS, generator=generator, device=DEVICE).bfloat16()
    yield big
    del big
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


ROWS = (0, BATCH // 2, BATCH - 1)


def test_score(backend, x):
    with bk.use_backend(backend):
        score = bk.laplacian_score(x, GRID)
        for row in ROWS:
            assert torch.equal(score[row], bk.laplacian_score(x[row : row + 1], GRID)[0])
            with bk.use_backend("reference"):
                expected = bk.laplacian_score(x[row : row + 1].double(), GRID)[0]
            assert_close(score[row], expected, torch.float32)


def test_merge_and_unmerge(backend, x):
    with bk.use_backend(backend):
        plan = bk.lgtm_plan(x[-1:], GRID, 0.1)
        y = bk.token_merge(x, plan)
        for row in ROWS:
            assert torch.equal(y[row], bk.token_merge(x[row : row + 1], plan)[0])
        del x
        out = bk.token_unmerge(y, plan)
        for row in ROWS:
            assert torch.equal(out[row], y[row, plan.slot[0].long()])


def test_whole_chain(backend, x):
    with bk.use_backend(backend):
        plan = bk.lgtm_plan(x, GRID, 0.5)
        for row in ROWS:
            assert torch.equal(plan.slot[row], bk.lgtm_plan(x[row : row + 1], GRID, 0.5).slot[0])


def test_shared_plan(backend, x):
    """The rows that share lie 2^30 elements apart."""
    with bk.use_backend(backend):
        rows = BATCH // 2
        plan = bk.lgtm_plan(x, GRID, 0.5, share_plan=2)
        pair = torch.stack([x[rows - 1], x[2 * rows - 1]])
        assert torch.equal(plan.slot[rows - 1], bk.lgtm_plan(pair, GRID, 0.5, share_plan=2).slot[0])


@pytest.mark.parametrize("alpha", [0.9, 1.0])
def test_kv_downsample(backend, x, alpha):
    with bk.use_backend(backend):
        pooled = bk.kv_downsample(x, GRID, 2, alpha)
        for row in ROWS:
            assert torch.equal(pooled[row], bk.kv_downsample(x[row : row + 1], GRID, 2, alpha)[0])


def test_a_row_stride_past_32_bits(backend, x):
    """Two tokens that lie more than 2^31 elements apart: the stride itself does not fit 32 bits."""
    far = x.as_strided((1, 2, CHANNELS), (1, (BATCH - 1) * N * CHANNELS, 1))
    with bk.use_backend(backend):
        assert_close(bk.laplacian_score(far, (1, 2)), bk.laplacian_score(far.contiguous(), (1, 2)), torch.float32)
        assert torch.equal(bk.kv_downsample(far, (1, 2), (1, 2), 1.0), far[:, 1:])
