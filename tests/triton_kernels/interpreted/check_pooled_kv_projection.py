from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bigain_kernels import reference
from bigain_kernels.testing import assert_close
from bigain_kernels.triton_kernels.kv_downsample import launch_kv_downsample
from bigain_kernels.triton_kernels.pooled_kv_projection import config_op, launch_pooled_kv_projection
from bigain_kernels.triton_kernels.registration import IMPLEMENTATIONS
from tests.shapes import tokens

from .inputs import DTYPES, candidates, on_device

project = on_device(launch_pooled_kv_projection)

ALPHAS = (-0.5, 0.0, 0.5, 0.9, 1.0, 1.3, torch.tensor([1.0, 0.0, -0.5]), torch.tensor([0.5, 0.9, 1.3]))
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


def weights(inner, channels, dtype, seed, strided=False):
    """A weight (inner, channels) that keeps the size of the numbers, and a bias (inner,)."""
    w = tokens(1, inner, channels, torch.float32, seed, strided)[0]
    return (w / channels**0.5).to(dtype), tokens(1, inner, 1, dtype, seed + 1)[0, :, 0]


def check(x, grid, factor, alpha, w_k, w_v, b_k=None, b_v=None, config=None):
    """Against exact products of what the unfused path multiplies: pooled tokens in the dtype of x."""
    out = project(x, grid, factor, alpha, w_k, w_v, b_k, b_v, config)
    wide = alpha.double() if isinstance(alpha, torch.Tensor) else alpha
    (pooled,) = on_device(launch_kv_downsample)([x], grid, factor, alpha)
    assert_close(pooled, reference.kv_downsample(x.double(), grid, factor, wide))
    for y, w, b in zip(out, (w_k, w_v), (b_k, b_v), strict=True):
        assert y.dtype == x.dtype
        assert y.is_contiguous()
        assert_close(y, F.linear(pooled.double(), w.double(), None if b is None else b.double()))
    return out


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "grid", "factor", "channels", "inner_k", "inner_v", "strided"), CASES, ids=IDS)
def test_projection(batch, grid, factor, channels, inner_k, inner_v, strided, dtype, biased):
    x = tokens(batch, grid[0] * grid[1], channels, dtype, strided=strided)
    (w_k, b_k), (w_v, b_v) = weights(inner_k, channels, dtype, 1, strided), weights(inner_v, channels, dtype, 3)
    check(x, grid, factor, 0.9, w_k, w_v, *((b_k, b_v) if biased else ()))


@pytest.mark.parametrize("alpha", ALPHAS, ids=str)
@pytest.mark.parametrize("factor", [(2, 2), (3, 3), (4, 4), (2, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_alphas(dtype, factor, alpha):
    (w_k, b_k), (w_v, _) = weights(24, 40, dtype, 1), weights(24, 40, dtype, 3)
    for grid in ((8, 12), (7, 9)):
        check(tokens(3, grid[0] * grid[1], 40, dtype), grid, factor, alpha, w_k, w_v, b_k, None)


def test_equals_pooling_what_was_projected():
    x, (w, b) = tokens(2, 63, 40), weights(24, 40, torch.float32, 1)
    for out in project(x, (7, 9), (2, 2), 0.9, w, w, b, b):
        projected = F.linear(x.double(), w.double(), b.double())
        assert_close(out, reference.kv_downsample(projected, (7, 9), (2, 2), 0.9))


@pytest.mark.parametrize("factor", [(1, 1), (2, 2), (3, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_config_gives_the_same_bits(dtype, factor):
    x = tokens(2, 320, 150, dtype)
    (w_k, b_k), (w_v, b_v) = weights(70, 150, dtype, 1), weights(70, 150, dtype, 3)
    results = [project(x, (16, 20), factor, 0.9, w_k, w_v, b_k, b_v, config) for config in candidates(config_op(dtype))]
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_tokens_stay_in_their_windows(dtype):
    x, (w, b) = tokens(2, 24, 40, dtype), weights(16, 40, dtype, 1)
    clean = project(x, (4, 6), (2, 2), 0.9, w, w, b, b)
    x[0, 1], x[1, 23] = torch.nan, torch.inf
    for out, before in zip(project(x, (4, 6), (2, 2), 0.9, w, w, b, b), clean, strict=True):
        touched = torch.zeros(2, 6, dtype=torch.bool)
        touched[0, 0] = touched[1, 5] = True
        assert torch.equal(out[~touched], before[~touched])
        assert not out[touched].isfinite().any()


@pytest.mark.parametrize("empty", ["batch", "inner", "channels"])
def test_empty(empty):
    x = torch.zeros(0 if empty == "batch" else 2, 24, 0 if empty == "channels" else 8)
    w = torch.zeros(0 if empty == "inner" else 4, x.shape[2])
    for out in project(x, (4, 6), (2, 2), 0.9, w, w, w.sum(1) + 1, None)[:1]:
        assert torch.equal(out, torch.ones(x.shape[0], 6, w.shape[0]))


@pytest.mark.parametrize("route", ["fused", "pooled"])
@pytest.mark.parametrize("alpha", [0.9, torch.tensor([1.0, 0.3])], ids=str)
def test_both_routes_of_the_op(route, alpha, monkeypatch):
    monkeypatch.setattr("bigain_kernels.triton_kernels.configs.route", lambda op, device, work: route)
    x, (w, b) = tokens(2, 63, 40), weights(24, 40, torch.float32, 1)
    number, rows = (0.0, alpha) if isinstance(alpha, torch.Tensor) else (alpha, None)
    out = on_device(IMPLEMENTATIONS["pooled_kv_projection"])(x, 7, 9, 2, 2, number, rows, w, w, b, None)
    wide = alpha.double() if isinstance(alpha, torch.Tensor) else alpha
    expected = reference.pooled_kv_projection(x.double(), (7, 9), (2, 2), wide, w.double(), w.double(), b.double())
    for y, truth in zip(out, expected, strict=True):
        assert_close(y, truth)
