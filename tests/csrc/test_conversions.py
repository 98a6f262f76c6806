"""Sixteen-bit floats are widened and rounded as PyTorch does it, by the machine or by integer arithmetic; on the
instruction set in use, test_determinism.py runs this file on the others."""

from __future__ import annotations

import pytest
import torch

import bigain_kernels as bk
from tests.shapes import tokens

pytestmark = pytest.mark.usefixtures("cpp")
HALVES = (torch.bfloat16, torch.float16)


def pooled(x, alpha):
    """One token for each two of x."""
    return bk.kv_downsample(x, (1, x.shape[1]), (1, 2), alpha)


@pytest.mark.parametrize("dtype", HALVES)
def test_every_value_comes_back_72(dtype):
    """All 65,536 of them as channels, in whole vectors and in the last lanes of one."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    plan = bk.lgtm_plan(tokens(1, 4, 8), (2, 2), 0.0)
    for channels in (2**16, 2**16 - 13):
        x = values[:channels].expand(1, 4, channels)
        same = bk.token_unmerge(x, plan, gate=torch.ones(1, channels, dtype=dtype))
        assert torch.equal(same.nan_to_num(7.0), x.nan_to_num(7.0))
        assert torch.equal(same.isnan(), x.isnan())
        assert torch.equal(same.signbit() & ~same.isnan(), x.signbit() & ~x.isnan())


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_72(dtype):
    """Means of two neighbours are ties; sums with one that is far smaller lie just beside them."""
    bits = torch.arange(0, 2**15 - 1, dtype=torch.int32)
    low, high = bits.to(torch.int16).view(dtype), (bits + 1).to(torch.int16).view(dtype)
    finite = high <= torch.finfo(dtype).max / 2
    low, high = low[finite], high[finite]
    for first, second in ((low, high), (-low, -high)):
        x = torch.stack([first, second])[None]
        expected = ((first.double() + second.double()) / 2).to(dtype)
        assert torch.equal(pooled(x, 0.0)[0, 0], expected)
    # Beyond the largest value: infinity, as PyTorch rounds.
    most = torch.full((1, 4, 40), torch.finfo(dtype).max, dtype=dtype)
    plan = bk.lgtm_plan(tokens(1, 4, 8), (2, 2), 0.0)
    assert bk.token_unmerge(most, plan, residual=most).isinf().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("channels", [1, 3, 16, 72, 129, 320])
def test_moments_of_values_far_from_zero_72(dtype, channels):
    """A mean thousands of deviations away, and a first value unlike all others."""
    x = tokens(1, 6, channels, torch.float64, seed=9) + 4096
    x[0, 3:, 0] = -4096
    x = x.to(dtype)
    plan = bk.lgtm_plan(x, (2, 3), 0.0)
    expected = torch.nn.functional.layer_norm(x.double(), (channels,), eps=1e-5)
    error = (bk.token_merge(x, plan, norm_eps=1e-5).double() - expected).abs().max()
    assert error <= (4e-3 if dtype == torch.float32 else 1e-10)
