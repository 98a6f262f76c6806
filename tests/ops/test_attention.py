"""Attention over downsampled keys and values against its definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import bigain_kernels as bk
from bigain_kernels.testing import TOLERANCES, assert_close
from tests.shapes import tokens

pytestmark = pytest.mark.usefixtures("backend")

# (grid, factor, text tokens in front, text tokens behind)
CASES = [
    ((4, 6), (2, 3), 0, 0),
    ((5, 7), (2, 2), 3, 0),
    ((7, 7), (3, 3), 0, 4),
    ((9, 5), (4, 4), 2, 5),
    ((6, 5), (2, 1), 1, 1),
    ((1, 1), (1, 1), 0, 0),
]


def heads_of(batch, n, heads, d, dtype=torch.float32, seed=0, layout="view"):
    """(batch, heads, n, d): "view" of a projection, "contiguous" per head, or a part of a "fused" projection."""
    if layout == "fused":
        return (
            tokens(batch, n, 3 * heads * d, dtype, seed)[..., heads * d : -heads * d]
            .unflatten(2, (heads, d))
            .transpose(1, 2)
        )
    x = tokens(batch, n, heads * d, dtype, seed).unflatten(2, (heads, d)).transpose(1, 2)
    return x.contiguous() if layout == "contiguous" else x


def expected_attention(q, k, v, grid, factor, alpha, scale=None, key_bias=None, image_tokens=None):
    """The definition in float64, head by head."""
    start, stop = image_tokens or (0, k.shape[2])
    batch, heads, _, d = q.shape
    alpha = alpha.double() if isinstance(alpha, torch.Tensor) else alpha
    out = torch.empty(q.shape, dtype=torch.float64)
    for b in range(batch):
        weight = alpha[b] if isinstance(alpha, torch.Tensor) else alpha
        for h in range(heads):
            keys, values = (
                torch.cat(
                    [
                        x[:start],
                        bk.reference.kv_downsample(x[None, start:stop], grid, factor, float(weight))[0],
                        x[stop:],
                    ]
                )
                for x in (k[b, h].double(), v[b, h].double())
            )
            scores = (d**-0.5 if scale is None else scale) * q[b, h].double() @ keys.T
            if key_bias is not None:
                scores += key_bias[b % key_bias.shape[0]].double()
            out[b, h] = scores.softmax(-1) @ values
    return out


@pytest.mark.parametrize("layouts", [("view", "view"), ("contiguous", "view"), ("fused", "fused"), ("contiguous",) * 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("grid", "factor", "front", "behind"), CASES)
def test_attention_is_softmax_over_pooled_keys(grid, factor, front, behind, dtype, layouts):
    n = grid[0] * grid[1]
    k, v = (heads_of(4, front + n + behind, 2, 8, dtype, i, layout) for i, layout in enumerate(layouts))
    q = heads_of(4, 11, 2, 8, dtype, 5)
    keys = front + (grid[0] // factor[0]) * (grid[1] // factor[1]) + behind
    image = (front, front + n)
    for alpha in (0.9, -0.5, torch.linspace(-0.5, 1.3, 4)):
        for bias in (None, tokens(2, keys, 1, dtype, seed=7)[..., 0]):
            arguments = (q, k, v, grid, factor, alpha, 0.3, bias, image)
            assert_close(bk.kv_downsample_attention(*arguments), expected_attention(*arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
def test_half_precision_errs_no_more_than_pytorch_does(dtype, biased):
    q, k, v = (heads_of(2, 48, 2, 16, dtype, seed) for seed in range(3))
    bias = torch.rand(2, 12) * 3 if biased else None
    arguments = (q, k, v, (6, 8), 2, 0.9, None, bias)
    truth = expected_attention(q, k, v, (6, 8), (2, 2), 0.9, None, bias)
    pooled = [torch.stack([bk.kv_downsample(x[:, h], (6, 8), 2, 0.9) for h in range(2)], 1) for x in (k, v)]
    mask = None if bias is None else bias[:, None, None].to(dtype)
    torch_error = (F.scaled_dot_product_attention(q, *pooled, attn_mask=mask) - truth).abs().max()
    out = bk.kv_downsample_attention(*arguments)
    assert out.dtype == dtype
    assert (out - truth).abs().max() <= 2 * torch_error


@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_factor_one_is_plain_attention(dtype):
    q, k, v = (heads_of(2, n, 2, 8, dtype, seed) for seed, n in enumerate((9, 24, 24)))
    plain = F.scaled_dot_product_attention(q, k, v)
    for alpha in (1.0, 0.3, torch.tensor([0.2, 1.4])):
        assert_close(bk.kv_downsample_attention(q, k, v, (4, 6), 1, alpha), plain)
        assert_close(bk.kv_downsample_attention(q, k, v, (1, 20), 1, alpha, image_tokens=(3, 23)), plain)


def test_proportional_attention_counts_merged_tokens_as_often_as_they_were():
    """Keys that stand for several equal tokens, with the log of their number as bias, give the attention over all."""
    q, k, v = (heads_of(2, n, 2, 8, torch.float64, seed) for seed, n in enumerate((9, 5, 5)))
    size = torch.tensor([1, 4, 2, 1, 7])
    whole = F.scaled_dot_product_attention(q, *(x.repeat_interleave(size, dim=2) for x in (k, v)))
    merged = bk.kv_downsample_attention(q, k, v, (1, 5), 1, 1.0, key_bias=size.log()[None])
    assert_close(merged, whole, torch.float32)  # size.log() is a float32


def test_rows_do_not_see_the_rest_of_the_batch():
    q, k, v = (heads_of(4, 24, 2, 8, seed=seed) for seed in range(3))
    bias = tokens(2, 6, 1)[..., 0]
    whole = bk.kv_downsample_attention(q, k, v, (4, 6), 2, 0.9, key_bias=bias)
    for b in range(4):
        row = [x[b : b + 1] for x in (q, k, v)]
        assert_close(bk.kv_downsample_attention(*row, (4, 6), 2, 0.9, key_bias=bias[b % 2, None]), whole[b : b + 1])


@pytest.mark.parametrize("batch", [0, 2])
def test_empty_batches_and_no_queries(batch):
    q, k = torch.zeros(batch, 2, 0, 8), torch.zeros(batch, 2, 24, 8)
    assert bk.kv_downsample_attention(q, k, k, (4, 6), 2, 0.9).shape == q.shape
    bias = torch.zeros(batch, 6)
    assert bk.kv_downsample_attention(q, k, k, (4, 6), 2, 0.9, key_bias=bias).shape == q.shape


def test_heads_are_joined_without_a_copy():
    q = heads_of(2, 24, 2, 8)
    for layout in ("view", "contiguous"):
        out = bk.kv_downsample_attention(*[heads_of(2, 24, 2, 8, layout=layout)] * 3, (4, 6), 2, 0.9)
        assert out.transpose(1, 2).is_contiguous()
        assert out.shape == q.shape
