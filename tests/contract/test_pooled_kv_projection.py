"""pooled_kv_projection against its definition: exact products of the pooled tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bigain_kernels import reference
from bigain_kernels.testing import assert_close

from ..shapes import tokens
from .gradients import assert_gradients
from .inputs import assert_same_bits

OP = "pooled_kv_projection"
ALPHAS = (-0.5, 0.0, 0.9, 1.0, 1.3, torch.tensor([1.0, 0.0, -0.5]))
# (batch, grid, factor, channels, inner_k, inner_v, strided)
CASES = [
    (3, (8, 8), (2, 2), 64, 32, 32, False),
    (3, (7, 9), (2, 2), 72, 40, 40, True),
    (2, (7, 10), (3, 3), 80, 72, 16, True),
    (2, (9, 9), (4, 4), 64, 8, 70, False),
    (1, (6, 5), (2, 1), 320, 64, 64, True),
    (2, (4, 6), (1, 1), 64, 64, 64, False),
    (1, (1, 1), (1, 1), 3, 5, 7, False),
]
IDS = [f"{b}x{g[0]}x{g[1]}-{f[0]}x{f[1]}-C{c}-{k}+{v}{'-strided' * s}" for b, g, f, c, k, v, s in CASES]


def weights(inner, channels, dtype=torch.float32, seed=0, strided=False):
    """A weight (inner, channels) that keeps the size of the numbers, and a bias (inner,)."""
    w = tokens(1, inner, channels, torch.float32, seed, strided)[0]
    return (w / channels**0.5).to(dtype), tokens(1, inner, 1, dtype, seed + 1)[0, :, 0]


def check(backend, x, grid, factor, alpha, w_k, w_v, b_k=None, b_v=None):
    """Pooled tokens are rounded to the dtype of x before they are multiplied."""
    wide = alpha.double() if isinstance(alpha, torch.Tensor) else alpha
    pooled = backend.kv_downsample(x, grid, factor, alpha)
    assert_close(pooled, reference.kv_downsample(x.double(), grid, factor, wide))
    results = backend.pooled_kv_projection(x, grid, factor, alpha, w_k, w_v, b_k, b_v)
    for y, w, b in zip(results, (w_k, w_v), (b_k, b_v), strict=True):
        assert y.dtype == x.dtype
        assert_close(y, F.linear(pooled.double(), w.double(), None if b is None else b.double()))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("batch", "grid", "factor", "channels", "inner_k", "inner_v", "strided"), CASES, ids=IDS)
def test_shapes(backend, dtype, batch, grid, factor, channels, inner_k, inner_v, strided, biased):
    x = tokens(batch, grid[0] * grid[1], channels, dtype, strided=strided)
    (w_k, b_k), (w_v, b_v) = weights(inner_k, channels, dtype, 1, strided), weights(inner_v, channels, dtype, 3)
    check(backend, x, grid, factor, 0.9, w_k, w_v, *((b_k, b_v) if biased else ()))


@pytest.mark.parametrize("alpha", ALPHAS, ids=str)
@pytest.mark.parametrize(("grid", "factor"), [((8, 12), (2, 2)), ((7, 9), (3, 3)), ((7, 9), (2, 1)), ((8, 12), (4, 4))])
def test_alphas(backend, dtype, grid, factor, alpha):
    """One bias of two."""
    (w_k, b_k), (w_v, _) = weights(24, 40, dtype, 1), weights(24, 40, dtype, 3)
    check(backend, tokens(3, grid[0] * grid[1], 40, dtype), grid, factor, alpha, w_k, w_v, b_k)


@pytest.mark.parametrize("alpha", [0.9, -0.5])
@pytest.mark.dtypes(torch.float64, torch.float32)
def test_equals_pooling_what_was_projected(backend, dtype, alpha):
    x, (w, b) = tokens(2, 63, 40, dtype), weights(24, 40, dtype, 1)
    projected = F.linear(x.double(), w.double(), b.double())
    for out in backend.pooled_kv_projection(x, (7, 9), (2, 2), alpha, w, w, b, b):
        assert_close(out, reference.kv_downsample(projected, (7, 9), (2, 2), alpha))


def test_infinite_tokens_stay_in_their_windows(backend, dtype):
    x, (w, b) = tokens(2, 24, 40, dtype), weights(16, 40, dtype, 1)
    clean = backend.pooled_kv_projection(x, (4, 6), (2, 2), 0.9, w, w, b, b)
    x[0, 1], x[1, 23] = torch.nan, torch.inf
    touched = torch.zeros(2, 6, dtype=torch.bool)
    touched[0, 0] = touched[1, 5] = True
    for out, before in zip(backend.pooled_kv_projection(x, (4, 6), (2, 2), 0.9, w, w, b, b), clean, strict=True):
        assert_same_bits(out[~touched], before[~touched])
        assert not out[touched].isfinite().any()


@pytest.mark.parametrize("empty", ["batch", "inner", "channels"])
def test_empty(backend, empty):
    x = torch.zeros(0 if empty == "batch" else 2, 24, 0 if empty == "channels" else 8)
    w = torch.zeros(0 if empty == "inner" else 4, x.shape[2])
    k, v = backend.pooled_kv_projection(x, (4, 6), (2, 2), 0.9, w, w, w.sum(1) + 1, None)
    assert torch.equal(k, torch.ones(x.shape[0], 6, w.shape[0]))
    assert torch.equal(v, torch.zeros(x.shape[0], 6, w.shape[0]))


@pytest.mark.parametrize(("factor", "biased"), [((2, 3), False), ((2, 3), True), ((5, 7), False)])
def test_gradients(backend, dtype, factor, biased):
    inputs = {"x": tokens(3, 35, 7, dtype, strided=True)}
    inputs["w_k"], inputs["w_v"] = tokens(2, 5, 7, dtype, seed=1)
    if biased:
        inputs["b_k"], inputs["b_v"] = tokens(2, 1, 5, dtype, seed=2)[:, 0]
    assert_gradients(backend, OP, lambda op, x, **given: op(x, (5, 7), factor, 0.8, **given), inputs, products=True)
