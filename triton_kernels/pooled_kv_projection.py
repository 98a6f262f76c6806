"""Keys and values of pooled hidden states: one matrix product whose loader pools (IE-KVD, BiGain); one launch.

A program makes a tile of keys and the same columns of the values, so that each pooled block is used twice. The tokens
of a window are read, blended in float32 and rounded to the input dtype between memory and the tensor cores, as
`kv_downsample` rounds what it stores; the pooled hidden states themselves reach no memory.

Each of the ceil(inner / BLOCK_N) programs of a block of tokens reads and blends the windows anew, against one launch
instead of three and no pooled copy; `run_pooled_kv_projection` says when that pays.

The same bits under every config: channels are summed in steps of BLOCK_K, in order, into float32. float32 products take
three TF32 products ("tf32x3"), on AMD GPUs "ieee"; see bipartite_match.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from ._common import EXACT, unit_last_stride
from .early import early, wait_for_predecessor
from .kv_downsample import launch_kv_downsample
from .launching import cdiv, programs
from .pooling import alpha_arguments, load_pooled, window_of

# 128 bytes of a row: the width of a shared-memory swizzle atom.
BLOCK_K = {torch.float16: 64, torch.bfloat16: 64, torch.float32: 32}


@triton.jit(do_not_specialize=["rows", "pooled", "height", "width", "window"])
def pooled_kv_projection_kernel(
    p_x,
    p_wk,
    p_wv,
    p_bk,
    p_bv,
    p_alpha,
    p_k,
    p_v,
    rows,
    pooled,
    height,
    width,
    window,
    channels,
    inner_k,
    inner_v,
    s_xb,
    s_xn,
    s_wk,
    s_wv,
    alpha,
    beta,
    BIAS_K: tl.constexpr,
    BIAS_V: tl.constexpr,
    ALPHA: tl.constexpr,
    SY: tl.constexpr,
    SX: tl.constexpr,
    DIVIDES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (block of output channels, block of the B * pooled tokens)."""
    wait_for_predecessor(EARLY)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = tl.arange(0, BLOCK_K)
    m_m, m_k, m_v = o_m < rows, o_n < inner_k, o_n < inner_v
    o_b = (o_m // pooled).to(tl.int64)
    if ALPHA == "rows":
        alpha = tl.load(p_alpha + o_b, mask=m_m, other=0.0)[:, None]
        beta = 1.0 - alpha
    o_corner, o_near = window_of(o_m % pooled, height, width, SY, SX)
    s_n = tl.cast(s_xn, tl.int64)
    s_row = width * s_n
    p_rows = p_x + o_b[:, None] * s_xb + o_c[None, :]
    p_corner = p_rows + o_corner[:, None] * s_n
    p_near = p_rows + o_near[:, None] * s_n
    p_wk += o_n.to(tl.int64)[None, :] * s_wk + o_c[:, None]
    p_wv += o_n.to(tl.int64)[None, :] * s_wv + o_c[:, None]
    b_k = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    b_v = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i_c in range(0, channels, BLOCK_K):
        m_c = i_c + o_c < channels
        m_x = m_m[:, None] & m_c[None, :]
        b_x = load_pooled(
            p_corner + i_c, p_near + i_c, m_x, m_x,
            s_row, s_n, window, alpha, beta, SY, SX, DIVIDES, ALPHA, False,
        )  # fmt: skip
        b_wk = tl.load(p_wk + i_c, mask=m_c[:, None] & m_k[None, :], other=0.0)
        b_wv = tl.load(p_wv + i_c, mask=m_c[:, None] & m_v[None, :], other=0.0)
        b_k = tl.dot(b_x, b_wk, b_k, input_precision=PRECISION)
        b_v = tl.dot(b_x, b_wv, b_v, input_precision=PRECISION)
    if BIAS_K:
        b_k += tl.load(p_bk + o_n, mask=m_k, other=0.0).to(tl.float32)[None, :]
    if BIAS_V:
        b_v += tl.load(p_bv + o_n, mask=m_v, other=0.0).to(tl.float32)[None, :]
    o_out = o_m.to(tl.int64)[:, None]
    dtype = p_k.dtype.element_ty
    tl.store(p_k + o_out * inner_k + o_n[None, :], b_k.to(dtype), mask=m_m[:, None] & m_k[None, :])
    tl.store(p_v + o_out * inner_v + o_n[None, :], b_v.to(dtype), mask=m_m[:, None] & m_v[None, :])


def launch_pooled_kv_projection(
    x: Tensor,
    grid: tuple[int, int],
    factor: tuple[int, int],
    alpha: float | Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_k: Tensor | None = None,
    b_v: Tensor | None = None,
    config: configs.Config | None = None,
) -> tuple[Tensor, Tensor]:
    """k (B, (H // sy) * (W // sx), inner_k) and v (..., inner_v) of x (B, N, C).

    Args:
        x: one of FLOAT_DTYPES, any strides.
        grid: (H, W).
        factor: (sy, sx).
        alpha: a number or a (B,) float32 tensor.
        w_k, w_v: (inner_k, C) and (inner_v, C) in the dtype of x.
        b_k, b_v: (inner_k,) and (inner_v,) in the dtype of x, or None.
        config: a candidate of `config_op`.
    """
    (height, width), (sy, sx) = grid, factor
    batch, pooled, channels = x.shape[0], (height // sy) * (width // sx), x.shape[2]
    inner_k, inner_v = w_k.shape[0], w_v.shape[0]
    k, v = (torch.empty((batch, pooled, inner), dtype=x.dtype, device=x.device) for inner in (inner_k, inner_v))
    inner, rows = max(inner_k, inner_v), batch * pooled
    if inner * rows == 0:
        return k, v
    x, w_k, w_v = (unit_last_stride(tensor) for tensor in (x, w_k, w_v))
    config = config or configs.pick(config_op(x.dtype), x.device, rows * inner * channels)
    blocks = cdiv(inner, config["BLOCK_N"]), cdiv(rows, config["BLOCK_M"])
    programs(pooled_kv_projection_kernel, *blocks)(
        p_x=x,
        p_wk=w_k,
        p_wv=w_v,
        p_bk=x if b_k is None else b_k.contiguous(),
        p_bv=x if b_v is None else b_v.contiguous(),
        p_k=k,
        p_v=v,
        rows=rows,
        pooled=pooled,
        height=height,
        width=width,
        window=sy * sx,
        channels=channels,
        inner_k=inner_k,
        inner_v=inner_v,
        s_xb=x.stride(0),
        s_xn=x.stride(1),
        s_wk=w_k.stride(0),
        s_wv=w_v.stride(0),
        **alpha_arguments(alpha, x),
        BIAS_K=b_k is not None,
        BIAS_V=b_v is not None,
        SY=sy,
        SX=sx,
        DIVIDES=height % sy == 0 and width % sx == 0,
        PRECISION="tf32x3" if x.dtype == torch.float32 and not torch.version.hip else "ieee",
        BLOCK_K=BLOCK_K[x.dtype],
        **config,
        **EXACT,
        **early(x.device),
    )
    return k, v


def config_op(dtype: torch.dtype) -> str:
    """The entry of tuned/*.json for a dtype: float32 tiles take twice the bytes."""
    return "pooled_kv_projection_fp32" if dtype == torch.float32 else "pooled_kv_projection"


def run_pooled_kv_projection(
    x: Tensor,
    grid: tuple[int, int],
    factor: tuple[int, int],
    alpha: float | Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_k: Tensor | None,
    b_v: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Pool and project in one launch or in three, whichever the table says.

    The measure is that of `run_kv_downsample_attention`: the windows are read and blended once per 64 output channels,
    and two launches are saved.
    """
    (height, width), (sy, sx) = grid, factor
    nearest = not isinstance(alpha, Tensor) and alpha == 1.0
    read = x.shape[0] * (height // sy) * (width // sx) * (1 if nearest else sy * sx)
    elements = read * x.shape[2] * cdiv(max(w_k.shape[0], w_v.shape[0]), 64)
    if configs.route("pooled_kv_projection", x.device, elements // 2) == "fused":
        return launch_pooled_kv_projection(x, grid, factor, alpha, w_k, w_v, b_k, b_v)
    (pooled,) = launch_kv_downsample([x], grid, factor, alpha)
    return F.linear(pooled, w_k, b_k), F.linear(pooled, w_v, b_v)
