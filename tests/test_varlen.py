"""Packed sequences: what varlen calls make of each sequence is what the ops make of it by itself, to the bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import bigain_kernels as bk
from bigain_kernels import MergePlan, PackedPlan

from .packings import packing

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
SHAPES = pytest.mark.parametrize("shape", [(12,), (3, 5)], ids=["C", "heads-d"])


def half(x, grid):
    """A plan of images of one size."""
    return bk.lgtm_plan(x, grid, 0.5) if min(grid) > 1 else MergePlan.identity(len(x), grid)


def flat(x):
    return x.flatten(1)[None]


@DTYPES
@SHAPES
@pytest.mark.parametrize("mode", ["mean", "mlerp", "prune"])
def test_merging_and_unmerging(dtype, shape, mode):
    given = packing(*shape, dtype=dtype)
    packed = bk.varlen_plan(given.x, given.cu_seqlens, given.grids, half, given.starts)
    weights = None if mode == "prune" else torch.rand(len(given.x), generator=torch.Generator().manual_seed(1)) + 0.5
    merged = bk.token_merge_varlen(given.x, packed, mode, weights)
    residual = given.x.flip(0)
    whole = bk.token_unmerge_varlen(merged, packed, residual)
    assert merged.dtype == whole.dtype == dtype
    assert merged.shape[1:] == whole.shape[1:] == shape
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.plan.sizes().sum() == len(given.x)
    ends, seen = packed.cu_seqlens.tolist(), 0
    for s, parts in enumerate(given.parts()):
        grid, inside = given.grids[s], [None] * 3 if weights is None else given.parts(weights)[s]
        # Tokens of no image are slots of one token.
        plans = [MergePlan.identity(1, (1, len(x))) for x in parts]
        plans[1] = half(flat(parts[1]), grid) if grid else plans[1]
        few = [
            bk.token_merge(flat(x), plan, mode, None if w is None else w[None])
            for x, plan, w in zip(parts, plans, inside, strict=True)
        ]
        expected = torch.cat([x[0].unflatten(1, shape) for x in few])
        assert ends[s : s + 2] == [seen, seen + len(expected)]
        assert torch.equal(merged[seen : seen + len(expected)], expected)
        seen += len(expected)
        begin, end = given.cu_seqlens[s : s + 2].tolist()
        back = [
            bk.token_unmerge(x, plan, flat(r)) for x, plan, r in zip(few, plans, given.parts(residual)[s], strict=True)
        ]
        assert torch.equal(whole[begin:end], torch.cat([x[0].unflatten(1, shape) for x in back]))
    assert seen == len(merged)


@DTYPES
@SHAPES
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("alpha", [0.9, "each"])
def test_pooling(dtype, shape, several, alpha):
    given = packing(*shape, dtype=dtype)
    other = packing(7, dtype=dtype, seed=1).x
    alphas = torch.linspace(0.5, 1.5, len(given.grids))
    tensors = (given.x, other) if several else given.x
    pooled, ends = bk.kv_downsample_varlen(
        tensors, given.cu_seqlens, given.grids, (1, 1), alphas if alpha == "each" else alpha, given.starts
    )
    for x, result in zip((given.x, other), pooled, strict=True) if several else [(given.x, pooled)]:
        torch.testing.assert_close(result, x)  # windows of one token
        assert result.shape == x.shape
    assert torch.equal(ends, given.cu_seqlens)

    grids = [None if grid == (1, 1) else grid for grid in given.grids]
    pooled, ends = bk.kv_downsample_varlen(
        tensors, given.cu_seqlens, grids, 2, alphas if alpha == "each" else alpha, given.starts
    )
    assert ends.dtype == torch.int32
    for x, result in zip((given.x, other), pooled, strict=True) if several else [(given.x, pooled)]:
        seen = 0
        for s, (front, image, behind) in enumerate(given.parts(x)):
            if grids[s] is not None:
                row = alphas[s : s + 1] if alpha == "each" else alpha
                image = bk.kv_downsample(flat(image), grids[s], 2, row)[0].unflatten(1, x.shape[1:])
            expected = torch.cat([front, image, behind])
            assert ends[s : s + 2].tolist() == [seen, seen + len(expected)]
            assert torch.equal(result[seen : seen + len(expected)], expected)
            seen += len(expected)
        assert seen == len(result)


def test_images_alone_are_a_batch():
    x = torch.randn(3, 24, 8, generator=torch.Generator().manual_seed(0))
    cu_seqlens, grids = torch.arange(4, dtype=torch.int32) * 24, [(4, 6)] * 3
    packed = bk.varlen_plan(x.flatten(0, 1), cu_seqlens, grids, half)
    plan = half(x, (4, 6))
    merged = bk.token_merge_varlen(x.flatten(0, 1), packed)
    assert torch.equal(merged, bk.token_merge(x, plan).flatten(0, 1))
    assert torch.equal(packed.plan.sizes().view(3, -1), plan.sizes())
    assert packed.cu_seqlens.tolist() == [0, 12, 24, 36]
    assert torch.equal(
        bk.token_unmerge_varlen(merged, packed), bk.token_unmerge(merged.view(3, 12, 8), plan).flatten(0, 1)
    )


def test_a_plan_for_all():
    """Guidance pairs, in the order of the rows: the first half of the sequences and the second."""
    x = torch.randn(4 * 24, 8, generator=torch.Generator().manual_seed(0))
    cu_seqlens, grids = torch.arange(5, dtype=torch.int32) * 24, [(4, 6)] * 4
    packed = bk.varlen_plan(x, cu_seqlens, grids, lambda x, grid: bk.lgtm_plan(x, grid, 0.5, share_plan=2))
    sizes = packed.plan.sizes().view(4, -1)
    assert torch.equal(sizes[:2], sizes[2:])
    assert not torch.equal(sizes[0], sizes[1])
    plan = bk.lgtm_plan(x.view(4, 24, 8), (4, 6), 0.5, share_plan=2)
    assert torch.equal(bk.token_merge_varlen(x, packed), bk.token_merge(x.view(4, 24, 8), plan).flatten(0, 1))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [3, 0, 2]])
def test_nothing_to_do(lengths):
    ends = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)
    x = torch.randn(sum(lengths), 4)
    packed = bk.varlen_plan(x, ends, [None] * len(lengths), half)
    assert torch.equal(packed.cu_seqlens, ends)
    merged = bk.token_merge_varlen(x, packed)
    assert torch.equal(merged, x)
    assert torch.equal(bk.token_unmerge_varlen(merged, packed), x)
    pooled, keys = bk.kv_downsample_varlen(x, ends, [None] * len(lengths), 2, 0.9)
    assert torch.equal(pooled, x)
    assert torch.equal(keys, ends)


def test_gradients():
    given = packing(4, dtype=torch.float64)
    packed = bk.varlen_plan(given.x, given.cu_seqlens, given.grids, half, given.starts)
    grids = [None if grid == (1, 1) else grid for grid in given.grids]
    alphas = torch.full((len(grids),), 0.9)

    def run(x, residual):
        pooled, _ = bk.kv_downsample_varlen(x, given.cu_seqlens, grids, 2, alphas, given.starts)
        return bk.token_unmerge_varlen(bk.token_merge_varlen(x, packed), packed, residual), pooled

    x, residual = (each.clone().requires_grad_() for each in (given.x, given.x.flip(0)))
    with torch.enable_grad():
        torch.autograd.gradcheck(run, (x, residual))


@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_waits_for_the_device(compiled):
    """Tensors without values, so that whoever reads one raises; those that are made without a device lie elsewhere."""
    given = packing(3, 4)

    def layer(x, cu_seqlens, starts):
        packed = bk.varlen_plan(x, cu_seqlens, given.grids, half_of_any, starts)
        y = bk.token_merge_varlen(x, packed)
        keys, ends = bk.kv_downsample_varlen((x, x + 1), cu_seqlens, given.grids, 1, 0.9, starts)
        return bk.token_unmerge_varlen(y, packed, x), packed.cu_seqlens, keys[0], ends

    def half_of_any(x, grid):
        return bk.lgtm_plan(x, grid, 0.5 if min(grid) > 1 else 0.0)

    wanted = layer(given.x, given.cu_seqlens, given.starts)
    if compiled:
        found = torch.compile(layer, fullgraph=True, backend="aot_eager")(given.x, given.cu_seqlens, given.starts)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)
        return
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.device("meta"):
        found = layer(*(mode.from_tensor(each) for each in (given.x, given.cu_seqlens, given.starts)))
    assert [(each.shape, each.dtype, each.device) for each in found] == [(e.shape, e.dtype, e.device) for e in wanted]


WRONG = {
    "cu_seqlens: got dtype int64": {"cu_seqlens": torch.tensor([0, 12])},
    "cu_seqlens: got shape": {"cu_seqlens": torch.zeros(2, 1, dtype=torch.int32)},
    "grids: got 2, expected 1": {"grids": [(3, 4), None]},
    r"grids\[0\]: got \(0, 4\)": {"grids": [(0, 4)]},
    "grids: got images of 16 tokens, expected at most 12": {"grids": [(4, 4)]},
    "starts: got 2 values": {"starts": torch.zeros(2, dtype=torch.int32)},
    "starts: got dtype float32": {"starts": torch.zeros(1)},
    "grids: got NoneType": {"grids": None},
    r"x: got shape \(12,\), expected 2 or 3 dimensions": {"x": torch.zeros(12)},
    "x: got dtype int64": {"x": torch.zeros(12, 4, dtype=torch.int64)},
    "plan: got a function that returns int": {"plan": lambda x, grid: 3},
    "plan: got a function that plans 2 rows of 12 tokens": {"plan": lambda x, grid: MergePlan.identity(2, grid)},
    "plan: got a function that plans 1 rows of 9 tokens": {"plan": lambda x, grid: MergePlan.identity(1, (3, 3))},
}


@pytest.mark.parametrize("message", WRONG)
def test_refusals_of_plans(message):
    given = {
        "x": torch.zeros(12, 4),
        "cu_seqlens": torch.tensor([0, 12], dtype=torch.int32),
        "grids": [(3, 4)],
        "plan": half,
    }
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        bk.varlen_plan(**{**given, **WRONG[message]})


def test_other_refusals():
    x, ends = torch.zeros(12, 4), torch.tensor([0, 12], dtype=torch.int32)
    packed = bk.varlen_plan(x, ends, [(3, 4)], half)
    with pytest.raises(TypeError, match=r"^packed: got MergePlan, expected a PackedPlan"):
        bk.token_merge_varlen(x, packed.plan)
    with pytest.raises(ValueError, match=r"^x: got 11 tokens"):
        bk.token_merge_varlen(x[1:], packed)
    with pytest.raises(ValueError, match=r"^y: got 12 tokens"):
        bk.token_unmerge_varlen(x, packed)
    for wrong, message in (
        (torch.ones(12, 1), r"got shape \(12, 1\), expected 1 dimension"),
        (torch.ones(11), "got 11 values, expected 12"),
        ([1.0] * 12, "got list"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^weights: {message}"):
            bk.token_merge_varlen(x, packed, weights=wrong)
    merged = bk.token_merge_varlen(x, packed)
    for wrong, message in (
        (torch.ones(12), r"got shape \(12,\), expected 2 or 3 dimensions"),
        (torch.ones(12, 5), r"got shape \(12, 5\), expected \(12, 4\)"),
        ([1.0], "got list"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^residual: {message}"):
            bk.token_unmerge_varlen(merged, packed, wrong)
    with pytest.raises(ValueError, match=r"^factor: got \(4, 4\), expected at most the grid"):
        bk.kv_downsample_varlen(x, ends, [(3, 4)], 4, 0.9)
    with pytest.raises(ValueError, match=r"^alpha: got 2 values, expected 1"):
        bk.kv_downsample_varlen(x, ends, [(3, 4)], 2, torch.zeros(2))
    with pytest.raises(ValueError, match=r"^x\[1\]: got 11 tokens, expected 12"):
        bk.kv_downsample_varlen((x, x[1:]), ends, [(3, 4)], 2, 0.9)
    with pytest.raises(ValueError, match=r"^x: got an empty sequence"):
        bk.kv_downsample_varlen([], ends, [(3, 4)], 2, 0.9)
    with pytest.raises(TypeError, match=r"^x: got int"):
        bk.kv_downsample_varlen(3, ends, [(3, 4)], 2, 0.9)


def test_it_is_a_pytree():
    packed = bk.varlen_plan(torch.zeros(12, 4), torch.tensor([0, 12], dtype=torch.int32), [(3, 4)], half)
    assert isinstance(torch.utils._pytree.tree_map(lambda each: each, packed), PackedPlan)


# What engines do around attention in a few lines: packing, a call of flash_attn_varlen_func, and the way back.


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None):
    """Attention of (total, heads, d) sequence by sequence, as a stand-in that refuses what the kernel may not get."""
    out = torch.full_like(q, torch.nan)
    for table, longest, x in ((cu_seqlens_q, max_seqlen_q, q), (cu_seqlens_k, max_seqlen_k, k)):
        assert table.dtype == torch.int32
        assert table[0] == 0
        assert table[-1] == len(x)
        assert table.diff().min() >= 0
        assert table.diff().max() <= longest
    for s in range(len(cu_seqlens_q) - 1):
        rows, columns = (slice(*table[s : s + 2].tolist()) for table in (cu_seqlens_q, cu_seqlens_k))
        parts = (x[where].transpose(0, 1) for x, where in ((q, rows), (k, columns), (v, columns)))
        out[rows] = F.scaled_dot_product_attention(*parts, scale=softmax_scale).transpose(0, 1)
    return out


@pytest.fixture
def padded():
    """q, k, v (B, S, heads, d), text, some of it padding, in front of images of 4 x 6; and the mask of what is none."""
    q, k, v = torch.randn(3, 3, 29, 2, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    mask = torch.ones(3, 29, dtype=torch.bool)
    mask[0, 2:5], mask[2, :5] = False, False
    return q, k, v, mask


def test_around_a_mask_of_keys_and_queries(padded):
    """SGLang's USPAttention with `attn_mask_meta`, vLLM-Omni's FlashAttentionImpl with `attn_mask`: all are packed."""
    q, k, v, mask = padded
    indices = mask.flatten().nonzero().flatten()
    cu_seqlens = F.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    q, k, v = (x.flatten(0, 1).index_select(0, indices) for x in (q, k, v))
    # What is added:
    starts = cu_seqlens[1:] - 24
    packed = bk.varlen_plan(k, cu_seqlens, [(4, 6)] * 3, half, starts)
    merged = (bk.token_merge_varlen(x, packed) for x in (q, k, v))
    out = flash_attn_varlen_func(*merged, packed.cu_seqlens, packed.cu_seqlens, 29, 29)
    out = bk.token_unmerge_varlen(out, packed)
    # The way back, and the same for each row by itself.
    back = torch.zeros(3 * 29, 2, 8).index_copy(0, indices, out).view(3, 29, 2, 8)
    for row in range(3):
        one = [x[cu_seqlens[row] : cu_seqlens[row + 1]] for x in (q, k, v)]
        text = len(one[0]) - 24
        plan = half(flat(one[1][text:]), (4, 6))
        few = [torch.cat([x[:text], bk.token_merge(flat(x[text:]), plan)[0].unflatten(1, (2, 8))]) for x in one]
        alone = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in few)).transpose(0, 1)
        image = bk.token_unmerge(flat(alone[text:]), plan)[0].unflatten(1, (2, 8))
        assert torch.equal(back[row, mask[row]], torch.cat([alone[:text], image]))
    assert not back[~mask].any()


def test_around_a_mask_of_keys(padded):
    """xDiT's backends with `indices_k`: queries are whole rows, keys and values are packed."""
    q, k, v, mask = padded
    indices = mask.flatten().nonzero().flatten()
    cu_seqlens_q = torch.arange(4, dtype=torch.int32) * 29
    cu_seqlens_k = F.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    k, v = (x.flatten(0, 1).index_select(0, indices) for x in (k, v))
    # What is added:
    starts = cu_seqlens_k[1:] - 24
    (fewer_k, fewer_v), cu_seqlens_k = bk.kv_downsample_varlen((k, v), cu_seqlens_k, [(4, 6)] * 3, 2, 0.9, starts)
    out = flash_attn_varlen_func(q.flatten(0, 1), fewer_k, fewer_v, cu_seqlens_q, cu_seqlens_k, 29, 29).view(
        3, 29, 2, 8
    )
    for row in range(3):
        whole = [x[row].transpose(0, 1)[None] for x in padded[:3]]
        keys = [x[:, :, torch.cat([mask[row, :5], torch.ones(24, dtype=torch.bool)])] for x in whole[1:]]
        text = keys[0].shape[2] - 24
        expected = bk.kv_downsample_attention(whole[0], *keys, (4, 6), 2, 0.9, image_tokens=(text, text + 24))
        torch.testing.assert_close(out[row], expected[0].transpose(0, 1), rtol=2e-5, atol=2e-5)
