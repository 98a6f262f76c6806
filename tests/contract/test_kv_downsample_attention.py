"""kv_downsample_attention against its definition in float64; in 16 bits it may err twice as much as PyTorch does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bigain_kernels import reference
from bigain_kernels.testing import assert_close

from ..shapes import tokens
from .gradients import assert_gradients

OP = "kv_downsample_attention"
EXACT = (torch.float64, torch.float32)
ALPHAS = (-0.5, 0.0, 0.9, 1.0, 1.3, torch.tensor([1.0, 0.0, -0.5]))
# (grid, factor, text in front, text behind): grids that the factor divides and others, windows that are unrolled and
# others, more keys than a block has.
LAYOUTS = [
    ((4, 6), (2, 2), 0, 0),
    ((5, 7), (2, 2), 3, 0),
    ((7, 10), (3, 3), 0, 4),
    ((9, 6), (4, 4), 2, 5),
    ((6, 5), (2, 1), 1, 1),
    ((3, 40), (1, 1), 0, 0),
    ((20, 17), (2, 2), 5, 9),
    ((1, 1), (1, 1), 0, 0),
]
IDS = [f"{g[0]}x{g[1]}-{f[0]}x{f[1]}-text{a}+{b}" for g, f, a, b in LAYOUTS]


def inputs(batch, queries, keys, heads, d, dtype, seed=0):
    """q (batch, heads, queries, d) of a projection, k and v (batch, heads, keys, d) of a fused one."""
    q = tokens(batch, queries, heads * d, dtype, seed).unflatten(2, (heads, d)).transpose(1, 2)
    kv = tokens(batch, keys, 2 * heads * d, dtype, seed + 1).chunk(2, dim=2)
    return q, *(x.unflatten(2, (heads, d)).transpose(1, 2) for x in kv)


def keys_of(grid, factor, front=0, behind=0):
    return front + (grid[0] // factor[0]) * (grid[1] // factor[1]) + behind


def pooled_and_expected(q, k, v, grid, factor, alpha, scale=None, bias=None, image=None):
    """Pooled keys and values, and the attention over them, head by head in float64."""
    start, stop = image or (0, k.shape[2])
    batch, heads, _, d = q.shape
    expected, pooled = torch.empty(q.shape, dtype=torch.float64), ([], [])
    for b in range(batch):
        weight = float(alpha[b]) if isinstance(alpha, torch.Tensor) else alpha
        for h in range(heads):
            both = [
                torch.cat([x[:start], reference.kv_downsample(x[None, start:stop], grid, factor, weight)[0], x[stop:]])
                for x in (k[b, h].double(), v[b, h].double())
            ]
            scores = (d**-0.5 if scale is None else scale) * q[b, h].double() @ both[0].T
            if bias is not None:
                scores += bias[b % bias.shape[0]].double()
            expected[b, h] = scores.softmax(-1) @ both[1]
            for rows, part in zip(pooled, both, strict=True):
                rows.append(part)
    return [torch.stack(rows).unflatten(0, (batch, heads)) for rows in pooled], expected


def check(backend, q, k, v, grid, factor, alpha, scale=None, bias=None, image=None):
    out = backend.kv_downsample_attention(q, k, v, grid, factor, alpha, scale, bias, image)
    pooled, truth = pooled_and_expected(q, k, v, grid, factor, alpha, scale, bias, image)
    assert out.dtype == q.dtype
    if q.dtype in EXACT:
        assert_close(out, truth)
        return
    pooled = [x.to(q.dtype) for x in pooled]
    mask = None if bias is None else bias.to(q.dtype).repeat(q.shape[0] // bias.shape[0], 1)[:, None, None]
    torch_error = (F.scaled_dot_product_attention(q, *pooled, attn_mask=mask, scale=scale) - truth).abs().max()
    assert (out - truth).abs().max() <= 2 * torch_error


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("grid", "factor", "front", "behind"), LAYOUTS, ids=IDS)
def test_text_around_the_image(backend, dtype, grid, factor, front, behind, biased):
    n = grid[0] * grid[1]
    q, k, v = inputs(2, 9, front + n + behind, 2, 40, dtype)
    bias = tokens(1, keys_of(grid, factor, front, behind), 1)[..., 0] if biased else None
    check(backend, q, k, v, grid, factor, 0.9, None, bias, (front, front + n))


@pytest.mark.parametrize("alpha", ALPHAS, ids=str)
@pytest.mark.parametrize(("grid", "factor"), [((8, 12), (2, 2)), ((7, 9), (3, 3)), ((7, 9), (4, 4)), ((7, 9), (2, 1))])
def test_alphas(backend, dtype, grid, factor, alpha):
    n = grid[0] * grid[1]
    check(backend, *inputs(3, 5, 2 + n, 1, 16, dtype), grid, factor, alpha, image=(2, 2 + n))


@pytest.mark.parametrize("d", [8, 24, 40, 64, 72, 80, 96, 112, 128, 160])
def test_head_dims(backend, dtype, d):
    bias = tokens(1, 15, 1)[..., 0]
    check(backend, *inputs(1, 17, 66, 2, d, dtype), (7, 9), (2, 2), 0.9, 0.2, bias, (1, 64))
    check(backend, *inputs(1, 17, 66, 2, d, dtype), (6, 11), (1, 1), 0.9)


@pytest.mark.parametrize("layout", ["one tensor per head", "one head", "odd strides", "last stride 2"])
def test_strides(backend, dtype, layout):
    q, k, v = inputs(2, 9, 24, 1 if layout == "one head" else 2, 40, dtype)
    if layout == "one tensor per head":
        q, k, v = (x.contiguous() for x in (q, k, v))
    if layout == "odd strides":
        q, k, v = (F.pad(x, (3, 2))[..., 3:-2] for x in (q, k, v))
    if layout == "last stride 2":
        k = k.repeat_interleave(2, dim=3)[..., ::2]
    check(backend, q, k, v, (4, 6), (2, 2), 0.9)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_shared_biases(backend, rows, kind):
    bias = tokens(rows, 6, 9, kind)[..., 4]
    check(backend, *inputs(4, 7, 24, 2, 40, torch.float32), (4, 6), (2, 2), 0.9, None, bias)


@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
@pytest.mark.parametrize("factor", [(1, 1), (2, 2)])
def test_scales(backend, factor, scale):
    check(backend, *inputs(1, 7, 128, 1, 40, torch.float32), (8, 16), factor, 0.9, scale)


def test_factor_one_is_plain_attention(backend, dtype):
    q, k, v = inputs(2, 9, 24, 2, 8, dtype)
    plain = F.scaled_dot_product_attention(q, k, v)
    for alpha in (1.0, 0.3, torch.tensor([0.2, 1.4])):
        assert_close(backend.kv_downsample_attention(q, k, v, (4, 6), 1, alpha), plain)
        out = backend.kv_downsample_attention(q, k, v, (1, 20), 1, alpha, image_tokens=(3, 23))
        assert_close(out, plain)


def test_proportional_attention(backend, dtype):
    """A key that stands for n equal tokens, with log(n) as its bias, weighs as much as these."""
    q, k, v = inputs(2, 9, 30, 2, 64, dtype)
    size = torch.randint(1, 20, (30,), generator=torch.Generator().manual_seed(0))
    out = backend.kv_downsample_attention(q, k, v, (1, 30), (1, 1), 1.0, None, size.float().log()[None])
    whole = [x.double().repeat_interleave(size, dim=2) for x in (k, v)]
    truth = F.scaled_dot_product_attention(q.double(), *whole)
    torch_error = (F.scaled_dot_product_attention(q, *(x.to(dtype) for x in whole)) - truth).abs().max()
    assert (out - truth).abs().max() <= max(2 * torch_error, 2e-6)


def test_masked_keys_have_no_weight(backend):
    q, k, v = inputs(1, 7, 70, 1, 40, torch.float32)
    bias = torch.zeros(1, 70)
    bias[0, :66] = -torch.inf
    out = backend.kv_downsample_attention(q, k, v, (1, 70), (1, 1), 1.0, None, bias)
    assert_close(out, F.scaled_dot_product_attention(q.double(), k[:, :, 66:].double(), v[:, :, 66:].double()))


def test_rows_do_not_see_the_rest_of_the_batch(backend):
    q, k, v = inputs(4, 24, 24, 2, 8, torch.float32)
    bias = tokens(2, 6, 1)[..., 0]
    whole = backend.kv_downsample_attention(q, k, v, (4, 6), 2, 0.9, key_bias=bias)
    for b in range(4):
        row = [x[b : b + 1] for x in (q, k, v)]
        alone = backend.kv_downsample_attention(*row, (4, 6), 2, 0.9, key_bias=bias[b % 2, None])
        assert_close(alone, whole[b : b + 1])


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 2, 0), (0, 2, 0)])
def test_empty(backend, shape, biased):
    batch, heads, queries = shape
    q, k, v = inputs(batch, queries, 24, heads, 40, torch.float32)
    bias = torch.zeros(batch, 6) if biased else None
    assert backend.kv_downsample_attention(q, k, v, (4, 6), 2, 0.9, key_bias=bias).shape == (batch, heads, queries, 40)


@pytest.mark.parametrize("layout", ["view", "contiguous"])
def test_heads_are_joined_without_a_copy(backend, layout):
    q, k, v = (x.contiguous() if layout == "contiguous" else x for x in inputs(2, 24, 24, 2, 8, torch.float32))
    assert backend.kv_downsample_attention(q, k, v, (4, 6), 2, 0.9).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(("factor", "biased"), [((1, 3), False), ((1, 3), True), ((3, 7), False)])
def test_gradients(backend, dtype, factor, biased):
    q, k, v = (tokens(2, 24, 32, dtype, seed).unflatten(2, (2, 16)).transpose(1, 2) for seed in range(3))
    inputs = {"q": q[:, :, :9], "k": k, "v": v}
    call = {"grid": (3, 7), "factor": factor, "alpha": 0.8, "image_tokens": (1, 22)}
    if biased:
        inputs["key_bias"] = tokens(1, 1, 6 + 3, torch.promote_types(dtype, torch.float32), seed=4)[0]
    assert_gradients(backend, OP, lambda op, **given: op(**given, **call), inputs, products=True)
