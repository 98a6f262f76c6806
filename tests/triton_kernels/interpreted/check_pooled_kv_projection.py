from __future__ import annotations

import pytest
import torch

from bigain_kernels import reference
from bigain_kernels.testing import assert_close
from bigain_kernels.triton_kernels.pooled_kv_projection import config_op, launch_pooled_kv_projection
from bigain_kernels.triton_kernels.registration import IMPLEMENTATIONS
from tests.shapes import tokens

from .inputs import DTYPES, candidates, on_device

project = on_device(launch_pooled_kv_projection)


def weights(inner, channels, dtype, seed, strided=False):
    """A weight (inner, channels) that keeps the size of the numbers, and a bias (inner,)."""
    w = tokens(1, inner, channels, torch.float32, seed, strided)[0]
    return (w / channels**0.5).to(dtype), tokens(1, inner, 1, dtype, seed + 1)[0, :, 0]


@pytest.mark.parametrize("factor", [(1, 1), (2, 2), (3, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_config_gives_the_same_bits(dtype, factor):
    x = tokens(2, 320, 150, dtype)
    (w_k, b_k), (w_v, b_v) = weights(70, 150, dtype, 1), weights(70, 150, dtype, 3)
    results = [project(x, (16, 20), factor, 0.9, w_k, w_v, b_k, b_v, config) for config in candidates(config_op(dtype))]
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


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
