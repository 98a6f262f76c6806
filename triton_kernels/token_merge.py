"""Merging tokens by a plan, and copying the result back to every token.

The order of every sum is fixed. A slot of up to LONG members is summed in ascending token order, as the reference
does, to the bit. A longer one is summed by LANES interleaved lanes, lane i taking members i, i + LANES, ... in order,
and the lanes are folded by `tree_sum`: when one destination attracts thousands of sources, LANES rows are in flight
instead of one. No program waits for another and nothing is accumulated in memory.

Programs own a few slots and CHANNELS channels. A whole row is needed only for the length of a mean ("mlerp"); the
statistics that mlerp and a fused LayerNorm need of the tokens come from `row_stats`, one launch before. LayerNorm is
linear in the normalized token, so its affine part (norm_weight, norm_bias, scale, shift) is applied once to the mean.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from ._common import CHANNELS, EXACT, LOG2_CHANNELS, tree_sum, unit_last_stride
from .row_stats import launch_row_stats

LONG = tl.constexpr(32)
LANES = tl.constexpr(32)
LOG2_LANES = tl.constexpr(5)
# Rows loaded before the first is added.
UNROLL = tl.constexpr(4)
_INTEGERS = ["n", "num_slots", "plan_rows"]


@triton.jit
def _load_token(
    p_x, p_weights, p_mean, p_inverse, b_token, m_token, o_c, m_c, s_xn, WEIGHTS: tl.constexpr, NORM: tl.constexpr
):
    """Tokens (T, CHANNELS) as float32, normalized and weighted when asked, zero where masked; and their weights."""
    b_x = tl.load(
        p_x + b_token.to(tl.int64)[:, None] * s_xn + o_c[None, :], mask=m_token[:, None] & m_c[None, :], other=0.0
    ).to(tl.float32)
    b_weight = m_token.to(tl.float32)
    if NORM:
        b_mean = tl.load(p_mean + b_token, mask=m_token, other=0.0)
        b_inverse = tl.load(p_inverse + b_token, mask=m_token, other=0.0)
        b_x = (b_x - b_mean[:, None]) * b_inverse[:, None]
    if WEIGHTS:
        b_weight = tl.load(p_weights + b_token, mask=m_token, other=0.0).to(tl.float32)
        b_x = b_x * b_weight[:, None]
    return b_x, b_weight


@triton.jit
def _segment_mean(
    p_x,
    p_weights,
    p_mean,
    p_inverse,
    p_members,
    b_begin,
    b_size,
    o_c,
    m_c,
    s_xn,
    WEIGHTS: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Mean over the members of each of BLOCK_M slots, (BLOCK_M, CHANNELS) float32."""
    b_sum = tl.zeros((BLOCK_M, CHANNELS), tl.float32)
    b_total = tl.zeros((BLOCK_M,), tl.float32)
    b_short = tl.where(b_size <= LONG, b_size, 0)
    for i in range(0, tl.max(b_short, 0), UNROLL):
        for j in tl.static_range(UNROLL):
            m_m = i + j < b_short
            b_token = tl.load(p_members + b_begin + i + j, mask=m_m, other=0)
            b_x, b_weight = _load_token(p_x, p_weights, p_mean, p_inverse, b_token, m_m, o_c, m_c, s_xn, WEIGHTS, NORM)
            # Adding what is masked would turn -0 into 0.
            b_sum = tl.where(m_m[:, None], b_sum + b_x, b_sum)
            b_total += b_weight

    if tl.max(b_size, 0) > LONG:
        o_m, o_l = tl.arange(0, BLOCK_M), tl.arange(0, LANES)
        for i_m in range(0, BLOCK_M):
            size = tl.sum(tl.where(o_m == i_m, b_size, 0), 0)
            if size > LONG:
                begin = tl.sum(tl.where(o_m == i_m, b_begin, 0), 0)
                b_lanes = tl.zeros((LANES, CHANNELS), tl.float32)
                b_lane_weight = tl.zeros((LANES,), tl.float32)
                for i in range(0, size, LANES * UNROLL):
                    for j in tl.static_range(UNROLL):
                        o_j = i + j * LANES + o_l
                        m_l = o_j < size
                        b_token = tl.load(p_members + begin + o_j, mask=m_l, other=0)
                        b_x, b_weight = _load_token(
                            p_x, p_weights, p_mean, p_inverse, b_token, m_l, o_c, m_c, s_xn, WEIGHTS, NORM
                        )
                        b_lanes += b_x
                        b_lane_weight += b_weight
                b_long = tree_sum(tl.trans(b_lanes), LOG2_LANES)
                b_long_weight = tree_sum(b_lane_weight[None, :], LOG2_LANES)
                b_sum = tl.where((o_m == i_m)[:, None], b_long[None, :], b_sum)
                b_total = tl.where(o_m == i_m, b_long_weight, b_total)

    if not WEIGHTS:
        b_total = tl.maximum(b_size, 1).to(tl.float32)
    return tl.div_rn(b_sum, tl.broadcast_to(b_total[:, None], (BLOCK_M, CHANNELS)))


@triton.jit
def _largest_norm(p_norm, p_members, b_begin, b_size):
    """The largest norm among the members of each slot; NaN if one is NaN."""
    b_largest = b_size.to(tl.float32) * 0.0
    for i in range(0, tl.max(b_size, 0)):
        b_token = tl.load(p_members + b_begin + i, mask=i < b_size, other=0)
        b_norm = tl.load(p_norm + b_token, mask=i < b_size, other=0.0)
        b_largest = tl.where((b_norm > b_largest) | (b_norm != b_norm), b_norm, b_largest)
    return b_largest


@triton.jit(do_not_specialize=_INTEGERS)
def token_merge_kernel(
    p_x,
    p_offsets,
    p_members,
    p_anchor,
    p_weights,
    p_mean,
    p_inverse,
    p_norm_weight,
    p_norm_bias,
    p_scale,
    p_shift,
    p_y,
    n,
    num_slots,
    channels,
    plan_rows,
    s_xb,
    s_xn,
    s_wb,
    s_yn,
    s_ab,
    MODE: tl.constexpr,
    WEIGHTS: tl.constexpr,
    NORM: tl.constexpr,
    AFFINE: tl.constexpr,
    MODULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Program (block of channels, block of slots, batch row). "mlerp" has one block of channels and loops over them.

    s_yn is the row length of p_y (B, M, C), which is contiguous; a divisor of it that the compiler knows widens stores.
    """
    i_c, i_m, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_p = i_b % plan_rows
    p_x += i_b * s_xb
    p_weights += i_b * s_wb
    p_mean += i_b * n
    p_inverse += i_b * n
    p_members += i_p * n
    p_offsets += i_p * (num_slots + 1)
    p_anchor += i_p * num_slots
    p_y += i_b * num_slots * s_yn
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < num_slots
    o_c = i_c * CHANNELS + tl.arange(0, CHANNELS)
    m_c = o_c < channels
    p_out = p_y + o_m.to(tl.int64)[:, None] * s_yn + o_c[None, :]

    if MODE == "prune":
        b_token = tl.load(p_anchor + o_m, mask=m_m, other=0)
        m_y = m_m[:, None] & m_c[None, :]
        tl.store(p_out, tl.load(p_x + b_token.to(tl.int64)[:, None] * s_xn + o_c[None, :], mask=m_y), mask=m_y)
        return

    b_begin = tl.load(p_offsets + o_m, mask=m_m, other=0)
    b_size = tl.load(p_offsets + o_m + 1, mask=m_m, other=0) - b_begin
    if MODE == "mlerp":
        b_squares = tl.zeros((BLOCK_M, CHANNELS), tl.float32)
        b_ratio = tl.zeros((BLOCK_M,), tl.float32)
        # First the length of the mean, then the mean again, from the cache, to be stored in that length.
        for step in range(0, 2):
            for i in range(0, channels, CHANNELS):
                b_y = _segment_mean(
                    p_x, p_weights, p_mean, p_inverse, p_members, b_begin, b_size, i + o_c, i + o_c < channels, s_xn,
                    WEIGHTS, NORM, BLOCK_M,
                )  # fmt: skip
                if step == 0:
                    b_squares = tl.fma(b_y, b_y, b_squares)
                else:
                    m_y = m_m[:, None] & (i + o_c < channels)[None, :]
                    tl.store(p_out + i, (b_y * b_ratio[:, None]).to(p_y.dtype.element_ty), mask=m_y)
            if step == 0:
                b_length = tl.sqrt_rn(tree_sum(b_squares, LOG2_CHANNELS))
                b_largest = _largest_norm(p_inverse, p_members, b_begin, b_size)
                b_ratio = tl.div_rn(b_largest, tl.where(b_length == 0.0, 1.0, b_length))
        return

    b_y = _segment_mean(
        p_x, p_weights, p_mean, p_inverse, p_members, b_begin, b_size, o_c, m_c, s_xn, WEIGHTS, NORM, BLOCK_M
    )
    if AFFINE:
        b_y = b_y * tl.load(p_norm_weight + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
        b_y = b_y + tl.load(p_norm_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    if MODULATE:
        b_y = b_y * (1.0 + tl.load(p_scale + i_b * s_ab + o_c, mask=m_c, other=0.0).to(tl.float32))[None, :]
        b_y = b_y + tl.load(p_shift + i_b * s_ab + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    tl.store(p_out, b_y.to(p_y.dtype.element_ty), mask=m_m[:, None] & m_c[None, :])


@triton.jit(do_not_specialize=["n", "plan_rows"])
def token_unmerge_kernel(
    p_y,
    p_slot,
    p_residual,
    p_gate,
    p_out,
    n,
    channels,
    plan_rows,
    s_yb,
    s_yn,
    s_rb,
    s_rn,
    s_gb,
    s_on,
    GATE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Program (block of channels, block of tokens, batch row): gate * y[slot] + residual, rounded once."""
    i_c, i_t, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_t, m_c = o_t < n, o_c < channels
    m_x = m_t[:, None] & m_c[None, :]
    b_slot = tl.load(p_slot + (i_b % plan_rows) * n + o_t, mask=m_t, other=0).to(tl.int64)
    b_y = tl.load(p_y + i_b * s_yb + b_slot[:, None] * s_yn + o_c[None, :], mask=m_x, other=0.0)
    if GATE:
        b_y = b_y.to(tl.float32) * tl.load(p_gate + i_b * s_gb + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        p_own = p_residual + i_b * s_rb + o_t.to(tl.int64)[:, None] * s_rn + o_c[None, :]
        b_y = b_y.to(tl.float32) + tl.load(p_own, mask=m_x, other=0.0).to(tl.float32)
    p_own = p_out + i_b * n * s_on + o_t.to(tl.int64)[:, None] * s_on + o_c[None, :]
    tl.store(p_own, b_y.to(p_out.dtype.element_ty), mask=m_x)


def launch_token_merge(
    x: Tensor,
    offsets: Tensor,
    members: Tensor,
    anchor: Tensor,
    mode: str = "mean",
    weights: Tensor | None = None,
    norm: bool = False,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    config: configs.Config | None = None,
) -> Tensor:
    """(B, N, C) tokens to (B, M, C) slots by tables of P rows; one launch, two with "mlerp" or `norm`.

    Args:
        x: (B, N, C), unit last stride.
        offsets, members, anchor: (P, M + 1), (P, N), (P, M) int32, contiguous; P divides B.
        mode: "mean", "mlerp" or "prune".
        weights: (B, N) weights of the tokens, or None.
        norm: merge LayerNorm(x) instead of x, not rounded in between; mode "mean" only.
        norm_weight, norm_bias: (C,) of the LayerNorm, both or neither.
        eps: of the LayerNorm.
        shift, scale: (B, C), both or neither: (1 + scale) * normalized + shift, as adaLN has it.
        config: a candidate of `token_merge`.
    """
    if norm and mode != "mean":
        raise ValueError(f"norm: got True with mode={mode!r}, expected mode='mean'")
    for one, other in (("norm_weight", "norm_bias"), ("shift", "scale")):
        given = {"norm_weight": norm_weight, "norm_bias": norm_bias, "shift": shift, "scale": scale}
        if (given[one] is None) != (given[other] is None):
            raise ValueError(f"{one}: expected together with {other}")
    x = unit_last_stride(x)
    batch, n, channels = x.shape
    num_slots = anchor.shape[1]
    y = torch.empty((batch, num_slots, channels), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    mean = inverse = x
    if norm:
        mean, inverse = launch_row_stats(x, "layernorm", eps)
    elif mode == "mlerp":
        mean, inverse = launch_row_stats(x, "norm")
    weights = x if weights is None else unit_last_stride(weights)
    if shift is not None and scale is not None:
        shift, scale = unit_last_stride(shift), unit_last_stride(scale)
        if shift.stride(0) != scale.stride(0):
            shift, scale = shift.contiguous(), scale.contiguous()
    config = config or configs.pick("token_merge", x.device, x.numel() * x.element_size())
    blocks = 1 if mode == "mlerp" else triton.cdiv(channels, CHANNELS.value)
    token_merge_kernel[blocks, triton.cdiv(num_slots, config["BLOCK_M"]), batch](
        p_x=x,
        p_offsets=offsets,
        p_members=members,
        p_anchor=anchor,
        p_weights=weights,
        p_mean=mean,
        p_inverse=inverse,
        p_norm_weight=x if norm_weight is None else norm_weight,
        p_norm_bias=x if norm_bias is None else norm_bias,
        p_scale=x if scale is None else scale,
        p_shift=x if shift is None else shift,
        p_y=y,
        n=n,
        num_slots=num_slots,
        channels=channels,
        plan_rows=offsets.shape[0],
        s_xb=x.stride(0),
        s_xn=x.stride(1),
        s_wb=weights.stride(0),
        s_yn=channels,
        s_ab=0 if shift is None else shift.stride(0),
        MODE=mode,
        WEIGHTS=weights is not x,
        NORM=norm,
        AFFINE=norm_weight is not None,
        MODULATE=shift is not None,
        **config,
        **EXACT,
    )
    return y


def launch_token_unmerge(
    y: Tensor,
    slot: Tensor,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    config: configs.Config | None = None,
) -> Tensor:
    """(B, M, C) slots to (B, N, C) tokens by slot (P, N) int32, contiguous, P dividing B; one launch.

    Args:
        y: (B, M, C).
        slot: (P, N) int32.
        residual: (B, N, C) added, or None.
        gate: (B, C) multiplied, or None.
        config: a candidate of `token_unmerge`.
    """
    y = unit_last_stride(y)
    batch, _, channels = y.shape
    n = slot.shape[1]
    out = torch.empty((batch, n, channels), dtype=y.dtype, device=y.device)
    if out.numel() == 0:
        return out
    config = config or configs.pick("token_unmerge", y.device, out.numel() * out.element_size())
    own_residual = y if residual is None else unit_last_stride(residual)
    own_gate = y if gate is None else unit_last_stride(gate)
    token_unmerge_kernel[triton.cdiv(channels, config["BLOCK_C"]), triton.cdiv(n, config["BLOCK_T"]), batch](
        p_y=y,
        p_slot=slot,
        p_residual=own_residual,
        p_gate=own_gate,
        p_out=out,
        n=n,
        channels=channels,
        plan_rows=slot.shape[0],
        s_yb=y.stride(0),
        s_yn=y.stride(1),
        s_rb=own_residual.stride(0),
        s_rn=own_residual.stride(1),
        s_gb=own_gate.stride(0),
        s_on=channels,
        GATE=gate is not None,
        RESIDUAL=residual is not None,
        **config,
        **EXACT,
    )
    return out
