"""Attention over downsampled keys and values against its definition."""

from __future__ import annotations

import pytest
import torch

import bigain_kernels as bk
from bigain_kernels.testing import assert_close
from tests.shapes import tokens

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_attention_is_softmax_over_pooled_keys(dtype):
    grid, factor, alpha, scale = (4, 6), (2, 3), 0.9, 0.3
    q, k, v = (tokens(2, 24, 8, dtype, seed=s).unflatten(2, (2, 4)).transpose(1, 2) for s in range(3))
    bias = tokens(2, 4, 1, dtype, seed=5)[..., 0]
    out = bk.kv_downsample_attention(q, k, v, grid, factor, alpha, scale=scale, key_bias=bias)
    pooled = [
        torch.stack([bk.kv_downsample(t[:, h].double(), grid, factor, alpha) for h in range(2)], 1) for t in (k, v)
    ]
    weights = (scale * q.double() @ pooled[0].transpose(-1, -2) + bias.double()[:, None, None]).softmax(-1)
    assert_close(out, weights @ pooled[1])
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert_close(bk.kv_downsample_attention(q, k, v, grid, 1, 1.0), plain)
