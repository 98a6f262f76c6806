"""Keys and values of downsampled hidden states against their definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import bigain_kernels as bk
from bigain_kernels.testing import assert_close
from tests.shapes import tokens

pytestmark = pytest.mark.usefixtures("backend")


def weights(inner, channels, dtype=torch.float32, seed=0):
    """A weight (inner, channels) that keeps the size of the numbers, and a bias (inner,)."""
    return tokens(1, inner, channels, dtype, seed)[0] / channels**0.5, tokens(1, inner, 1, dtype, seed + 1)[0, :, 0]


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("grid", "factor"), [((4, 6), (2, 3)), ((7, 9), (2, 2)), ((9, 9), (4, 4)), ((6, 5), (2, 1)), ((1, 1), (1, 1))]
)
def test_projecting_the_pooled_tokens_equals_pooling_the_projected(grid, factor, dtype, strided):
    x = tokens(3, grid[0] * grid[1], 10, dtype, strided=strided)
    (w_k, b_k), (w_v, b_v) = weights(6, 10, dtype, 1), weights(4, 10, dtype, 3)
    for alpha in (0.9, -0.5, torch.tensor([-0.5, 0.3, 1.3])):
        wide = alpha.double() if isinstance(alpha, torch.Tensor) else alpha
        for biased in (True, False):
            bias = (b_k, b_v) if biased else (None, None)
            k, v = bk.pooled_kv_projection(x, grid, factor, alpha, w_k, w_v, *bias)
            for out, w, b in ((k, w_k, bias[0]), (v, w_v, bias[1])):
                projected = F.linear(x.double(), w.double(), None if b is None else b.double())
                assert_close(out, bk.reference.kv_downsample(projected, grid, factor, wide))


def test_one_bias_of_two():
    x = tokens(2, 24, 10)
    (w_k, b_k), (w_v, _) = weights(6, 10, seed=1), weights(6, 10, seed=3)
    k, v = bk.pooled_kv_projection(x, (4, 6), 2, 0.9, w_k, w_v, b_k=b_k)
    without = bk.pooled_kv_projection(x, (4, 6), 2, 0.9, w_k, w_v)
    assert_close(k, without[0] + b_k)
    assert_close(v, without[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_pools_in_float32_and_rounds_once(dtype):
    x = tokens(2, 48, 32, dtype)
    w, b = weights(16, 32, dtype)
    pooled = bk.kv_downsample(x, (6, 8), 2, 0.9)
    for out in bk.pooled_kv_projection(x, (6, 8), 2, 0.9, w, w, b, b):
        assert out.dtype == dtype
        assert_close(out, F.linear(pooled.double(), w.double(), b.double()))


@pytest.mark.parametrize(("batch", "inner"), [(0, 4), (2, 0)])
def test_empty_batches_and_empty_weights(batch, inner):
    x, w = torch.zeros(batch, 24, 8), torch.zeros(inner, 8)
    for out in bk.pooled_kv_projection(x, (4, 6), 2, 0.9, w, w):
        assert out.shape == (batch, 6, inner)
