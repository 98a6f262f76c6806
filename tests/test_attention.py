"""proportional_attention against attention over all tokens, each key a copy for every token it stands for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bigain_kernels.attention import proportional_attention
from bigain_kernels.backends import key_bias
from bigain_kernels.testing import assert_close

from .shapes import tokens

ROUTES = ("op", "mask", "channels")
HALF = (torch.bfloat16, torch.float16)


def inputs(batch, queries, keys, heads, d, dtype):
    """q of a projection, k and v of a fused one; sizes (batch, keys) from 1 to 19."""
    q = tokens(batch, queries, heads * d, dtype, 0).unflatten(2, (heads, d)).transpose(1, 2)
    kv = tokens(batch, keys, 2 * heads * d, dtype, 1).chunk(2, dim=2)
    sizes = torch.randint(1, 20, (batch, keys), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    return q, *(x.unflatten(2, (heads, d)).transpose(1, 2) for x in kv), sizes


def over_copies(q, k, v, sizes, scale=None):
    """Plain attention over all tokens, row by row: the definition."""
    rows = []
    for b in range(q.shape[0]):
        times = sizes[b % sizes.shape[0]].long()
        whole = (x[b : b + 1].repeat_interleave(times, dim=2) for x in (k, v))
        rows.append(F.scaled_dot_product_attention(q[b : b + 1], *whole, scale=scale))
    return torch.cat(rows)


def rms(x, truth):
    return (x.double() - truth).square().mean().sqrt()


@pytest.mark.parametrize("route", [*ROUTES, None])
@pytest.mark.parametrize("d", [1, 8, 40, 64, 72, 80, 160])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_attention_over_copies(dtype, d, route):
    q, k, v, sizes = inputs(2, 9, 30, 2, d, dtype)
    for scale in (None, 0.7, -0.3, 2.0**-12):
        truth = over_copies(*(x.double() for x in (q, k, v)), sizes, scale)
        out = proportional_attention(q, k, v, sizes, scale, route)
        assert out.dtype == dtype
        assert_close(out, truth)


@pytest.mark.parametrize("route", [*ROUTES, None])
@pytest.mark.parametrize("d", [40, 64, 72, 160])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_16_bits_err_as_plain_attention_does(dtype, d, route):
    q, k, v, sizes = inputs(2, 40, 200, 2, d, dtype)
    truth = over_copies(*(x.double() for x in (q, k, v)), sizes)
    plain = rms(over_copies(q, k, v, sizes), truth)
    rounded = sizes.to(dtype).log()[:, None, None]
    assert rms(proportional_attention(q, k, v, sizes, None, route), truth) <= 1.05 * plain
    # What a mask of the dtype would cost.
    assert rms(F.scaled_dot_product_attention(q, k, v, attn_mask=rounded), truth) > 1.1 * plain


def test_16_bit_derivatives_through_every_route():
    """The CPU's kernel for a float32 mask beside 16-bit tokens has a backward pass, and so have the channels."""
    for route in ("mask", "channels"):
        q, k, v, sizes = inputs(2, 9, 30, 2, 40, torch.bfloat16)
        exact = [x.double().requires_grad_() for x in (q, k, v)]
        rounded = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            over_copies(*exact, sizes).square().sum().backward()
            proportional_attention(*rounded, sizes, None, route).square().sum().backward()
        for x, y in zip(rounded, exact, strict=True):
            assert rms(x.grad, y.grad) < 0.01 * y.grad.square().mean().sqrt()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("scale", [2.0**-15, 0.125, 1.7, -3.0, 2.0**14])
def test_channels_hold_float32_biases_of_any_size(dtype, scale):
    """With queries of zeros nothing but the bias is left: -inf and what overflows float16 weigh nothing."""
    q, k, v = (x.to(dtype) for x in inputs(1, 3, 12, 1, 8, torch.float32)[:3])
    bias = torch.tensor([[0.0, 1e-3, 0.1, 1.0, 2.7, 5.3, -9.1, -40.0, -300.0, -7e4, -1e30, -torch.inf]])
    out = key_bias.attend_with_bias(torch.zeros_like(q), k, v, bias, scale, "channels")
    truth = bias.double().softmax(1) @ v[0, 0].double()
    assert_close(out[0, 0], truth.expand(3, -1), dtype)


def test_rows_share_sizes_and_sizes_may_have_any_dtype():
    q, k, v, sizes = inputs(4, 5, 9, 2, 8, torch.float32)
    truth = over_copies(q, k, v, sizes[:2])
    for route in ROUTES:
        for dtype in (torch.int32, torch.int64, torch.float32, torch.bfloat16):
            assert_close(proportional_attention(q, k, v, sizes[:2].to(dtype), None, route), truth)
    empty = proportional_attention(q[:0], k[:0], v[:0], sizes[:0], None, "channels")
    assert empty.shape == (0, 2, 5, 8)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_table_says_which_way(dtype, monkeypatch):
    """On a CPU a mask in float32 beside 16-bit tokens; through channels nothing but plain attention is called."""
    q, k, v, sizes = inputs(2, 5, 9, 2, 40, dtype)
    calls, attention = [], F.scaled_dot_product_attention

    def record(q, k, v, attn_mask=None, **rest):
        calls.append((q.dtype, q.shape[3], v.shape[3], None if attn_mask is None else attn_mask.dtype))
        return attention(q, k, v, attn_mask=attn_mask, **rest)

    monkeypatch.setattr(key_bias.F, "scaled_dot_product_attention", record)
    proportional_attention(q, k, v, sizes)
    monkeypatch.setitem(key_bias.CHANNELS_UP_TO, ("cpu", dtype), 40)
    proportional_attention(q, k, v, sizes)
    proportional_attention(q, k, v, sizes, scale=0.0)
    assert calls == [(dtype, 40, 40, torch.float32), (dtype, 48, 48, None), (dtype, 40, 40, torch.float32)]
    assert {key_bias.CHANNELS_UP_TO["cuda", dtype] + key_bias.PARTS} == {256}


@pytest.mark.parametrize("route", ["op", "mask", "channels", None])
def test_derivatives(route):
    q, k, v, sizes = inputs(2, 3, 4, 1, 5, torch.float64)
    for x in (q, k, v):
        x.requires_grad_()
    with torch.enable_grad():
        assert torch.autograd.gradcheck(lambda *qkv: proportional_attention(*qkv, sizes, None, route), (q, k, v))


@pytest.mark.parametrize("route", ROUTES)
def test_autocast_changes_nothing(route):
    q, k, v, sizes = inputs(2, 5, 9, 2, 40, torch.float32)
    wanted = proportional_attention(q, k, v, sizes, None, route)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(proportional_attention(q, k, v, sizes, None, route), wanted)


@pytest.mark.parametrize("route", [*ROUTES, None])
def test_compiles_to_one_graph_for_all_lengths(route):
    count = 0

    def graphs(module, _):
        nonlocal count
        count += 1
        return module.forward

    compiled = torch.compile(proportional_attention, backend=graphs, fullgraph=True, dynamic=True)
    for keys in (9, 14, 23):
        q, k, v, sizes = inputs(2, keys, keys, 2, 40, torch.bfloat16)
        wanted = proportional_attention(q, k, v, sizes, None, route)
        assert torch.equal(compiled(q, k, v, sizes, None, route), wanted)
    assert count == 1
    torch._dynamo.reset()


def test_rows_do_not_see_the_rest_of_the_batch():
    q, k, v, sizes = inputs(4, 24, 24, 2, 64, torch.bfloat16)
    for route in ROUTES:
        whole = proportional_attention(q, k, v, sizes, None, route)
        for b in range(4):
            row = slice(b, b + 1)
            assert torch.equal(proportional_attention(q[row], k[row], v[row], sizes[row], None, route), whole[row])
