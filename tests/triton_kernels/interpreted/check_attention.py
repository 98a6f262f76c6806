from __future__ import annotations

import pytest
import torch

from bigain_kernels import reference
from bigain_kernels.testing import assert_close
from bigain_kernels.triton_kernels.kv_downsample import launch_kv_downsample
from bigain_kernels.triton_kernels.kv_downsample_attention import config_op, head_blocks, launch_kv_downsample_attention
from bigain_kernels.triton_kernels.registration import IMPLEMENTATIONS
from tests.shapes import tokens

from .inputs import DTYPES, candidates, on_device

attention = on_device(launch_kv_downsample_attention)

HEADS = (40, 64, 72, 80, 96, 128, 160)


def inputs(batch, queries, keys, heads, d, dtype, seed=0):
    """q (batch, heads, queries, d) of a projection, k and v (batch, heads, keys, d) of a fused one."""
    q = tokens(batch, queries, heads * d, dtype, seed).unflatten(2, (heads, d)).transpose(1, 2)
    kv = tokens(batch, keys, 2 * heads * d, dtype, seed + 1).chunk(2, dim=2)
    return q, *(x.unflatten(2, (heads, d)).transpose(1, 2) for x in kv)


def keys_of(grid, factor, front=0, behind=0):
    return front + (grid[0] // factor[0]) * (grid[1] // factor[1]) + behind


def test_head_blocks_pad_little():
    assert {d: head_blocks(d) for d in HEADS} == {
        40: (32, 16), 64: (64, 0), 72: (64, 16), 80: (64, 16), 96: (64, 32), 128: (128, 0), 160: (128, 32)
    }  # fmt: skip
    for d in range(1, 161):
        first, second = head_blocks(d)
        assert d <= first + second <= max(16, 2 * d)


def test_masked_keys_have_no_weight_and_rows_without_keys_are_zero():
    q, k, v = inputs(2, 7, 70, 1, 40, torch.float32)
    bias = torch.zeros(2, 70)
    bias[0, :66] = -torch.inf
    bias[1] = -torch.inf
    out = attention(q, k, v, (1, 70), (1, 1), 1.0, None, bias)
    assert_close(
        out[0],
        reference.kv_downsample_attention(
            *(x[:1, :, s:].double() for x, s in ((q, 0), (k, 66), (v, 66))), (1, 4), (1, 1), 1.0
        )[0],
    )
    assert torch.equal(out[1], torch.zeros_like(out[1]))


def test_large_scores_of_a_negative_scale_do_not_overflow():
    q, k, v = inputs(1, 7, 128, 1, 40, torch.float32)
    out = attention(q, k, v, (8, 16), (1, 1), 1.0, -40.0)
    truth = reference.kv_downsample_attention(q.double(), k.double(), v.double(), (8, 16), (1, 1), 1.0, -40.0)
    # Scores of some hundreds have errors of some 1e-5, and so have the logarithms of the weights.
    assert (out - truth).abs().max() < 1e-3


@pytest.mark.parametrize("d", [40, 72, 128])
@pytest.mark.parametrize("factor", [(1, 1), (2, 2), (3, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_config_gives_the_same_bits(dtype, factor, d):
    q, k, v = inputs(1, 70, 99, 1, d, dtype)
    bias = tokens(1, keys_of((9, 11), factor), 1)[..., 0]
    for key_bias in (None, bias):
        results = [
            attention(q, k, v, (9, 11), factor, 0.9, None, key_bias, config=config)
            for config in candidates(config_op(dtype, d, factor != (1, 1)))
        ]
        for result in results[1:]:
            assert torch.equal(result, results[0])


@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0, torch.tensor([1.0, 0.4])], ids=str)
@pytest.mark.parametrize("factor", [(2, 2), (3, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pooling_inside_gives_the_bits_of_pooling_before(dtype, factor, alpha):
    q, k, v = inputs(2, 5, 63, 1, 40, dtype)
    inside = attention(q, k, v, (7, 9), factor, alpha)
    pooled = [x[:, None] for x in on_device(launch_kv_downsample)([k[:, 0], v[:, 0]], (7, 9), factor, alpha)]
    before = attention(q, *pooled, (1, pooled[0].shape[2]), (1, 1), 1.0)
    assert torch.equal(inside, before)


# With alpha 1, token 1 is in a window and not its nearest; with alpha 0, token 8 is the nearest of a window that it is
# not in.
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize(("alpha", "grid", "factor", "token"), [(1.0, (2, 11), (2, 2), 1), (0.0, (2, 11), (1, 4), 8)])
def test_what_has_weight_zero_does_not_show(alpha, grid, factor, token, rows):
    q, k, v = inputs(2, 5, 22, 1, 40, torch.float32)
    weight = torch.full((2,), alpha) if rows else alpha
    before = attention(q, k, v, grid, factor, weight)
    k[:, :, token], v[:, :, token] = torch.inf, torch.nan
    assert torch.equal(attention(q, k, v, grid, factor, weight), before)
    assert before.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 0, 5), (2, 2, 0)])
def test_empty(shape):
    batch, heads, queries = shape
    q, k, v = inputs(batch, queries, 24, heads, 40, torch.float32)
    assert attention(q, k, v, (4, 6), (2, 2), 0.9).shape == (batch, heads, queries, 40)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("route", ["fused", "pooled"])
@pytest.mark.parametrize("layout", ["view", "contiguous"])
def test_both_routes_of_the_op(route, text, biased, layout, monkeypatch):
    monkeypatch.setattr("bigain_kernels.triton_kernels.configs.route", lambda op, device, work: route)
    front, behind = (3, 2) if text else (0, 0)
    q, k, v = inputs(4, 9, 35 + front + behind, 2, 40, torch.float32)
    if layout == "contiguous":
        k = k.contiguous()
    bias = tokens(2, keys_of((5, 7), (2, 2), front, behind), 1)[..., 0] if biased else None
    rows = torch.tensor([0.9, 1.0, 1.3, 0.0])
    arguments = (5, 7, 2, 2, 0.0, rows, None, bias, front, front + 35)
    out = on_device(IMPLEMENTATIONS["kv_downsample_attention"])(q, k, v, *arguments)
    image = (front, front + 35)
    wide = None if bias is None else bias.double()
    truth = reference.kv_downsample_attention(
        q.double(), k.double(), v.double(), (5, 7), (2, 2), rows.double(), None, wide, image
    )
    assert_close(out, truth)
    assert out.transpose(1, 2).is_contiguous()
