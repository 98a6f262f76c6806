"""Flash attention whose loader pools keys and values (IE-KVD, BiGain), with a bias per key; one launch, no workspace.

A program holds a block of queries of one head and goes over the keys in blocks of BLOCK_N with an online softmax (Dao
et al. 2022). The tokens of a window are read, blended in float32 and rounded to the input dtype between memory and the
tensor cores. Text tokens in front of and behind the image are keys like all others whose window is one token. With
factor 1 nothing is blended, which leaves plain attention with a bias per key (proportional attention, Bolya et al.
2023).

Every program pools the keys and values of its head again: against attention over pooled tensors that is sy * sx times
the bytes and the blending once per block of queries, in exchange for one launch less and for no pooled copy.
`run_kv_downsample_attention` says when that pays.

Head dims that are no power of two are split into two blocks, the largest power of two and the rest (72 is 64 + 16, 96
is 64 + 32), so that tensor cores work on little padding.

The same bits under every config: BLOCK_N belongs to the case (`block_n`), not to the config, and rows of scores lie
within one warp, since what is spread over warps is M. So the order of every sum is that of its row, whatever BLOCK_M,
the warps and the stages are; `aot` looks at the layouts that the compiler chose.
float32 products take three TF32 products ("tf32x3"), on AMD GPUs "ieee"; see bipartite_match.py.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigain_kernels.backends.compositions import attend, pool_image
from bigain_kernels.declaration import OPS

from . import configs
from ._common import EXACT, unit_last_stride
from .early import early, wait_for_predecessor
from .kv_downsample import launch_kv_downsample
from .launching import cdiv, power_of_2, programs
from .pooling import UNROLLED, alpha_arguments, load_pooled, window_of

LARGEST_HEAD = 160
# Heads of more channels have configs of their own.
WIDE = 80
# Elements that all strides are multiples of wherever possible: 16 bytes of a 16-bit tensor.
UNIT = 8
_INTEGERS = ["queries", "keys", "image_start", "image_keys", "image_skip", "height", "width", "window", "bias_rows"]


@triton.jit
def _inside(m_rows, o_d, FULL: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Mask of a block (rows, channels); without a test of the channels where all of them are inside."""
    if FULL:
        return tl.broadcast_to(m_rows[:, None], (m_rows.shape[0], o_d.shape[0]))
    return m_rows[:, None] & (o_d < HEAD_DIM)[None, :]


@triton.jit(do_not_specialize=_INTEGERS)
def kv_downsample_attention_kernel(
    p_q,
    p_k,
    p_v,
    p_bias,
    p_alpha,
    p_out,
    queries,
    keys,
    image_start,
    image_keys,
    image_skip,
    height,
    width,
    window,
    bias_rows,
    s_qb,
    s_qh,
    s_qn,
    s_kb,
    s_kh,
    s_kn,
    s_vb,
    s_vh,
    s_vn,
    s_bp,
    s_ob,
    s_oh,
    s_on,
    scale,
    alpha,
    beta,
    BIAS: tl.constexpr,
    ALPHA: tl.constexpr,
    MASKED: tl.constexpr,
    TEXT: tl.constexpr,
    SY: tl.constexpr,
    SX: tl.constexpr,
    DIVIDES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (block of queries, head, batch row). Strides of q, k, v and out count UNIT elements. Keys are image_start
    whole tokens, image_keys windows, and whole tokens whose index is image_skip higher than that of their key. Scores
    are in powers of two: scale is that of the softmax over log(2). With MASKED or BIAS, scores get a bias."""
    wait_for_predecessor(EARLY)
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    if ALPHA == "rows":
        alpha = tl.load(p_alpha + i_b)
        beta = 1.0 - alpha
    p_q += (i_b * s_qb + i_h * s_qh) * UNIT
    p_k += (i_b * s_kb + i_h * s_kh) * UNIT
    p_v += (i_b * s_vb + i_h * s_vh) * UNIT
    s_k, s_v = tl.cast(s_kn, tl.int64) * UNIT, tl.cast(s_vn, tl.int64) * UNIT
    s_krow, s_vrow = width * s_k, width * s_v
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_j = tl.arange(0, BLOCK_N)
    o_1 = tl.arange(0, D1)
    m_m = o_m < queries
    FULL: tl.constexpr = D1 <= HEAD_DIM
    p_rows = p_q + o_m.to(tl.int64)[:, None] * (s_qn * UNIT)
    b_q1 = tl.load(p_rows + o_1[None, :], mask=_inside(m_m, o_1, FULL, HEAD_DIM), other=0.0)
    b_out1 = tl.zeros((BLOCK_M, D1), tl.float32)
    if D2 > 0:
        o_2 = D1 + tl.arange(0, D2)
        FULL2: tl.constexpr = D1 + D2 <= HEAD_DIM
        b_q2 = tl.load(p_rows + o_2[None, :], mask=_inside(m_m, o_2, FULL2, HEAD_DIM), other=0.0)
        b_out2 = tl.zeros((BLOCK_M, D2), tl.float32)
    b_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)

    for i_n in range(0, keys, BLOCK_N):
        o_n = i_n + o_j
        m_n = o_n < keys
        m_pooled = m_n
        o_corner, o_near = o_n, o_n
        if SY * SX > 1:
            o_corner, o_near = window_of(o_n - image_start, height, width, SY, SX)
            if TEXT:
                m_pooled = (o_n >= image_start) & (o_n < image_start + image_keys)
                o_behind = tl.where(o_n < image_start, o_n, o_n + image_skip)
                o_corner = tl.where(m_pooled, image_start + o_corner, o_behind)
                o_near = tl.where(m_pooled, image_start + o_near, o_behind)
        o_corner, o_near = o_corner.to(tl.int64)[:, None], o_near.to(tl.int64)[:, None]
        m_1 = _inside(m_n, o_1, FULL, HEAD_DIM)
        b_k1 = load_pooled(
            p_k + o_corner * s_k + o_1[None, :], p_k + o_near * s_k + o_1[None, :], m_1, m_pooled[:, None],
            s_krow, s_k, window, alpha, beta, SY, SX, DIVIDES, ALPHA, TEXT,
        )  # fmt: skip
        b_s = tl.dot(b_q1, tl.trans(b_k1), input_precision=PRECISION)
        if D2 > 0:
            m_2 = _inside(m_n, o_2, FULL2, HEAD_DIM)
            b_k2 = load_pooled(
                p_k + o_corner * s_k + o_2[None, :], p_k + o_near * s_k + o_2[None, :], m_2, m_pooled[:, None],
                s_krow, s_k, window, alpha, beta, SY, SX, DIVIDES, ALPHA, TEXT,
            )  # fmt: skip
            b_s = tl.dot(b_q2, tl.trans(b_k2), b_s, input_precision=PRECISION)
        if BIAS or MASKED:
            b_bias = tl.where(m_n, 0.0, float("-inf"))
            if BIAS:
                p_row = p_bias + (i_b % bias_rows) * s_bp
                b_bias = tl.load(p_row + o_n, mask=m_n, other=float("-inf")).to(tl.float32) * 1.4426950408889634
            b_s = tl.fma(b_s, scale, b_bias[None, :])
            b_high = tl.maximum(b_max, tl.max(b_s, 1))
            # A row whose keys are all at -inf so far has no maximum to subtract.
            b_shift = tl.where(b_high == float("-inf"), 0.0, b_high)
            b_p = tl.exp2(b_s - b_shift[:, None])
        else:
            b_high = tl.maximum(b_max, tl.max(b_s, 1) * scale)
            b_shift = b_high
            b_p = tl.exp2(tl.fma(b_s, scale, -b_shift[:, None]))
        b_keep = tl.exp2(b_max - b_shift)
        b_max = b_high
        b_sum = b_sum * b_keep + tl.sum(b_p, 1)
        b_weights = b_p.to(p_v.dtype.element_ty)
        b_v1 = load_pooled(
            p_v + o_corner * s_v + o_1[None, :], p_v + o_near * s_v + o_1[None, :], m_1, m_pooled[:, None],
            s_vrow, s_v, window, alpha, beta, SY, SX, DIVIDES, ALPHA, TEXT,
        )  # fmt: skip
        b_out1 = tl.dot(b_weights, b_v1, b_out1 * b_keep[:, None], input_precision=PRECISION)
        if D2 > 0:
            b_v2 = load_pooled(
                p_v + o_corner * s_v + o_2[None, :], p_v + o_near * s_v + o_2[None, :], m_2, m_pooled[:, None],
                s_vrow, s_v, window, alpha, beta, SY, SX, DIVIDES, ALPHA, TEXT,
            )  # fmt: skip
            b_out2 = tl.dot(b_weights, b_v2, b_out2 * b_keep[:, None], input_precision=PRECISION)

    # Keys that are all at -inf have no weights: zeros, as in PyTorch.
    b_inverse = tl.div_rn(1.0, tl.where(b_sum == 0.0, 1.0, b_sum))[:, None]
    p_out += (i_b * s_ob + i_h * s_oh) * UNIT
    p_rows = p_out + o_m.to(tl.int64)[:, None] * (s_on * UNIT)
    tl.store(
        p_rows + o_1[None, :],
        (b_out1 * b_inverse).to(p_out.dtype.element_ty),
        mask=_inside(m_m, o_1, FULL, HEAD_DIM),
    )
    if D2 > 0:
        tl.store(
            p_rows + o_2[None, :],
            (b_out2 * b_inverse).to(p_out.dtype.element_ty),
            mask=_inside(m_m, o_2, FULL2, HEAD_DIM),
        )


def block_n(dtype: torch.dtype, d: int, blends: bool) -> int:
    """Keys at a time: as many as registers allow. One answer for all configs of a case."""
    if dtype == torch.float32:
        return 32 if d <= 64 else 16
    return 32 if d > WIDE and blends else 64


def head_blocks(d: int) -> tuple[int, int]:
    """(D1, D2), powers of two of at least 16 (or D2 = 0) that cover d channels with little padding."""
    first = 1 << (d.bit_length() - 1)
    if first < 16:
        return 16, 0
    rest = d - first
    second = max(16, power_of_2(rest)) if rest else 0
    return (first, second) if second < first else (2 * first, 0)


def launch_kv_downsample_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    factor: tuple[int, int],
    alpha: float | Tensor,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    image_tokens: tuple[int, int] | None = None,
    config: configs.Config | None = None,
) -> Tensor:
    """Attention of q (B, heads, Nq, d) over the pooled k, v (B, heads, T, d); memory of the result: (B, Nq, heads, d).

    Args:
        q, k, v: one of FLOAT_DTYPES, d at most LARGEST_HEAD, strides as they are (last 1).
        grid: (H, W) of the image tokens.
        factor: (sy, sx).
        alpha: a number or a (B,) float32 tensor.
        scale: of the scores; None is 1 / sqrt(d).
        key_bias: (P, keys) of one of FLOAT_DTYPES, or None.
        image_tokens: (start, stop); None: all tokens.
        config: a candidate of the entry that `config_op` names.
    """
    (height, width), (sy, sx) = grid, factor
    batch, heads, queries, d = q.shape
    tokens = k.shape[2]
    start, stop = image_tokens or (0, tokens)
    pooled = (height // sy) * (width // sx)
    keys = start + pooled + tokens - stop
    out = torch.empty((batch, queries, heads, d), dtype=q.dtype, device=q.device).transpose(1, 2)
    if out.numel() == 0:
        return out
    q, k, v = (unit_last_stride(x) for x in (q, k, v))
    bias = None if key_bias is None else unit_last_stride(key_bias)
    strides = {
        f"s_{name}{axis}": x.stride(i)
        for name, x in (("q", q), ("k", k), ("v", v), ("o", out))
        for i, axis in enumerate("bhn")
    }
    unit = UNIT if all(stride % UNIT == 0 for stride in strides.values()) else 1
    blend = alpha_arguments(alpha, q)
    blends = blend["ALPHA"] != "one"
    keys_at_once = block_n(q.dtype, d, blends)
    scale = d**-0.5 if scale is None else scale
    d1, d2 = head_blocks(d)
    config = config or configs.pick(config_op(q.dtype, d, blends), q.device, batch * heads * queries * keys)
    programs(kv_downsample_attention_kernel, cdiv(queries, config["BLOCK_M"]), heads, batch)(
        p_q=q,
        p_k=k,
        p_v=v,
        p_bias=q if bias is None else bias,
        p_out=out,
        queries=queries,
        keys=keys,
        image_start=start,
        image_keys=pooled,
        image_skip=stop - start - pooled,
        height=height,
        width=width,
        window=sy * sx,
        bias_rows=1 if bias is None else bias.shape[0],
        **{name: stride // unit for name, stride in strides.items()},
        s_bp=0 if bias is None else bias.stride(0),
        scale=scale / math.log(2),
        **blend,
        BIAS=bias is not None,
        # The maximum of scores may be scaled instead of the scores when they keep their order.
        MASKED=keys % keys_at_once != 0 or scale < 0,
        TEXT=stop - start != tokens,
        SY=sy,
        SX=sx,
        DIVIDES=height % sy == 0 and width % sx == 0,
        HEAD_DIM=d,
        D1=d1,
        D2=d2,
        UNIT=unit,
        PRECISION="tf32x3" if q.dtype == torch.float32 and not torch.version.hip else "ieee",
        BLOCK_N=keys_at_once,
        # Stages hold whole windows: those of larger ones would not fit shared memory.
        **{**config, "num_stages": 1 if blends and sy * sx > UNROLLED else config["num_stages"]},
        **EXACT,
        **early(q.device),
    )
    return out


def config_op(dtype: torch.dtype, d: int, blends: bool) -> str:
    """The entry of tuned/*.json for a case: windows take registers, wide heads and float32 take them and more."""
    name = "attention_fp32" if dtype == torch.float32 else "attention_pooled" if blends else "attention"
    return f"{name}_wide" if d > WIDE else name


def run_kv_downsample_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    factor: tuple[int, int],
    alpha: float | Tensor,
    scale: float | None,
    key_bias: Tensor | None,
    image_tokens: tuple[int, int],
) -> Tensor:
    """Pool K and V in a launch and attend, or pool them inside attention, whichever the table says.

    Inside attention, every block of queries reads and blends all windows again. So the measure of a call is the number
    of elements that all blocks of queries read per launch saved: one with nothing but image tokens, three (pooling, and
    joining K and V with the text) otherwise. docs/kernels.md has the estimate behind it.

    After pooling, attention is PyTorch's, unless there is a bias per key: a mask throws PyTorch off its flash kernels.
    """
    (height, width), (sy, sx), (start, stop) = grid, factor, image_tokens
    batch, heads, queries, d = q.shape
    fits = d <= LARGEST_HEAD
    if fits and factor != (1, 1):
        text = k.shape[2] - (stop - start)
        nearest = not isinstance(alpha, Tensor) and alpha == 1.0
        read = (height // sy) * (width // sx) * (1 if nearest else sy * sx) + text
        elements = batch * heads * cdiv(queries, 128) * read * 2 * d
        if configs.route("kv_downsample_attention", q.device, elements // (3 if text else 1)) == "fused":
            return launch_kv_downsample_attention(q, k, v, grid, factor, alpha, scale, key_bias, image_tokens)
    number, row_alpha = (0.0, alpha) if isinstance(alpha, Tensor) else (alpha, None)
    pooling = (height, width, sy, sx, number, row_alpha, start, stop)
    k, v = pool_image([k, v], *pooling, _pool)
    if fits and key_bias is not None:
        return launch_kv_downsample_attention(q, k, v, (1, k.shape[2]), (1, 1), 1.0, scale, key_bias)
    return attend(q, k, v, scale, key_bias)


_pool = OPS["kv_downsample"].of_launcher(launch_kv_downsample)
