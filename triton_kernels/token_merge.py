"""Merging tokens by a plan.

The order of every sum is fixed, and no program waits for another or accumulates in memory: see `segment_mean`. Slots of
HUGE members or more are done in small parts by the first programs of the launch, before these merge slots of their own.

Programs own a few slots and CHANNELS channels. A whole row is needed only for the length of a mean ("mlerp"); the
statistics that mlerp and a fused LayerNorm need of the tokens come from `row_stats`, one launch before. LayerNorm is
linear in the normalized token, so its affine part (norm_weight, norm_bias, scale, shift) is applied once to the mean.
"""

# Triton does not unpack tuples into others.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,var-annotated"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from ._common import CHANNELS, EXACT, LOG2_CHANNELS, to_float32, tree_sum, unit_last_stride, unit_of
from .early import early, wait_for_predecessor
from .launching import cdiv, programs
from .row_stats import launch_row_stats
from .segment_mean import (
    HUGE,
    HUGE_CHANNELS,
    LONG,
    POSITIONS,
    add_long_means,
    huge_mean,
    huge_slots,
    largest_norm,
    long_mean,
    segment_mean,
)

# More than a short slot has members.
ANY_LONG = tl.constexpr(1 << 16)
# Programs that share CHANNELS channels of a huge slot.
PARTS = tl.constexpr(CHANNELS.value // HUGE_CHANNELS.value)
_INTEGERS = ["n", "num_slots", "units", "plan_rows", "spread", "s_xb", "s_xn", "s_ab"]


@triton.jit
def _row(units, UNIT: tl.constexpr, FAR: tl.constexpr):
    """The length of a row in elements, in the type that offsets are to have."""
    return tl.cast(units, tl.int64 if FAR else tl.int32) * UNIT


@triton.jit
def _scale_and_shift(b_y, p_scale, p_shift, more, o_c, m_c):
    """b_y * (scale + more) + shift."""
    # Of every row, though all are the same: so a thread reads 16 bytes where it has the values, and from the L1 cache.
    o_y, m_y = tl.broadcast_to(o_c[None, :], b_y.shape), tl.broadcast_to(m_c[None, :], b_y.shape)
    b_scale = to_float32(tl.load(p_scale + o_y, mask=m_y, other=0.0)) + more
    return tl.fma(b_y, b_scale, to_float32(tl.load(p_shift + o_y, mask=m_y, other=0.0)))


@triton.jit
def _affine(b_y, p_norm_weight, p_norm_bias, p_scale, p_shift, o_c, m_c, AFFINE: tl.constexpr, MODULATE: tl.constexpr):
    """(T, C) normalized means with the affine parts of LayerNorm and adaLN."""
    if AFFINE:
        b_y = _scale_and_shift(b_y, p_norm_weight, p_norm_bias, 0.0, o_c, m_c)
    if MODULATE:
        b_y = _scale_and_shift(b_y, p_scale, p_shift, 1.0, o_c, m_c)
    return b_y


@triton.jit
def _mean_slots(
    p_x, p_weights, p_words, p_norm_weight, p_norm_bias, p_scale, p_shift, p_offsets, p_members, p_y,
    num_slots, channels, s_xn, s_yn, i_m, o_m, o_c, WEIGHTS: tl.constexpr, NORM: tl.constexpr,
    AFFINE: tl.constexpr, MODULATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Means of slots o_m (BLOCK_M,) of up to LONG members, in BLOCKS blocks of channels from o_c on, and of as many
    slots from all over the row (`far_slots`), those of more."""
    m_m = o_m < num_slots
    b_begin = tl.load(p_offsets + o_m, mask=m_m, other=0)
    b_size = tl.load(p_offsets + o_m + 1, mask=m_m, other=0) - b_begin
    o_far = far_slots(i_m, num_slots, BLOCK_M)
    b_far_begin = tl.load(p_offsets + o_far, mask=o_far < num_slots, other=0)
    b_far_size = tl.load(p_offsets + o_far + 1, mask=o_far < num_slots, other=0) - b_far_begin
    m_m = m_m & (b_size <= LONG)
    # One maximum tells both: how many members the short slots have, and whether there is a long one.
    most = tl.max(tl.where(m_m, b_size, 0) + tl.where(b_far_size > LONG, ANY_LONG, 0), 0)
    b_means = segment_mean(
        p_x, p_weights, p_words, p_members, b_begin, b_size, tl.minimum(most, LONG), o_c, channels, s_xn,
        WEIGHTS, NORM, BLOCK_M, BLOCKS, UNROLL,
    )  # fmt: skip
    # No store before the last load, which could not be asked for early.
    b_results = ()
    for i in tl.static_range(BLOCKS):
        o_own = o_c + i * CHANNELS
        b_y = _affine(
            b_means[i], p_norm_weight, p_norm_bias, p_scale, p_shift, o_own, o_own < channels, AFFINE, MODULATE
        )
        b_results = b_results + (b_y.to(p_y.dtype.element_ty),)
    for i in tl.static_range(BLOCKS):
        o_own = o_c + i * CHANNELS
        p_out = p_y + (o_m[:, None] * s_yn + o_own[None, :])
        tl.store(p_out, b_results[i], mask=m_m[:, None] & (o_own < channels)[None, :])
    if most >= ANY_LONG:
        _long_slots(
            p_x, p_weights, p_words, p_norm_weight, p_norm_bias, p_scale, p_shift, p_members, p_y,
            b_far_begin, b_far_size, o_far, channels, s_xn, s_yn, o_c, WEIGHTS, NORM, AFFINE, MODULATE, BLOCK_M,
            BLOCKS,
        )  # fmt: skip


@triton.jit
def far_slots(i_m, num_slots, BLOCK_M: tl.constexpr):
    """Slots from all over the row, for block i_m of them; at or beyond num_slots where there are none.

    Each slot is in the list of one block. Where a picture is flat, long slots lie together; so a block has one slot of
    every stretch of as many as there are blocks: neighbours come to other blocks. So do slots a stretch apart, or at
    any even distance, as what lies below one another: stretches begin at another block each, by triangular numbers,
    which are all different modulo a power of two, and in no line.
    """
    stretch = tl.cdiv(num_slots, BLOCK_M)
    o_stretch = tl.arange(0, BLOCK_M)
    o_place = i_m + o_stretch * (o_stretch + 1) // 2 % BLOCK_M * (stretch // BLOCK_M)
    return o_stretch * stretch + tl.where(o_place < stretch, o_place, o_place - stretch)


@triton.jit
def _long_slots(
    p_x, p_weights, p_words, p_norm_weight, p_norm_bias, p_scale, p_shift, p_members, p_y, b_begin, b_size,
    o_far, channels, s_xn, s_yn, o_c, WEIGHTS: tl.constexpr, NORM: tl.constexpr, AFFINE: tl.constexpr,
    MODULATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Means of those of slots o_far (BLOCK_M,) that have more than LONG members, but for huge ones."""
    o_m = tl.arange(0, BLOCK_M)
    m_long = (b_size > LONG) & (b_size < HUGE)
    for i in range(0, BLOCK_M):
        size = tl.sum(tl.where(m_long & (o_m == i), b_size, 0), 0)
        if size > 0:
            begin = tl.sum(tl.where(o_m == i, b_begin, 0), 0)
            p_row = p_y + tl.sum(tl.where(o_m == i, o_far, 0), 0) * s_yn
            for j in range(0, BLOCKS):
                o_own = o_c + j * CHANNELS
                m_c = o_own < channels
                b_mean = long_mean(p_x, p_weights, p_words, p_members, begin, size, o_own, m_c, s_xn, WEIGHTS, NORM)
                b_y = _affine(
                    b_mean[None, :], p_norm_weight, p_norm_bias, p_scale, p_shift, o_own, m_c, AFFINE, MODULATE
                )
                tl.store(p_row + o_own[None, :], b_y.to(p_y.dtype.element_ty), mask=m_c[None, :])


@triton.jit
def _mlerp_slots(
    p_x, p_weights, p_norm, p_huge, p_offsets, p_members, p_y, num_slots, channels, s_xn, s_yn, o_m, o_c,
    WEIGHTS: tl.constexpr, BLOCK_M: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Means of slots o_m (BLOCK_M,) in the length of the largest member, a block of channels after the other."""
    m_m = o_m < num_slots
    b_begin = tl.load(p_offsets + o_m, mask=m_m, other=0)
    b_size = tl.load(p_offsets + o_m + 1, mask=m_m, other=0) - b_begin
    m_huge = b_size >= HUGE
    most = tl.max(tl.where(b_size <= LONG, b_size, 0), 0)
    p_own_huge = p_huge + tl.cdiv(b_begin, HUGE)[:, None] * s_yn + o_c[None, :]
    p_out = p_y + (o_m[:, None] * s_yn + o_c[None, :])
    b_squares = tl.zeros((BLOCK_M, CHANNELS), tl.float32)
    b_ratio = tl.zeros((BLOCK_M,), tl.float32)
    # First the length of the mean, then the mean again, from the cache, to be stored in that length.
    for step in range(0, 2):
        for i in range(0, channels, CHANNELS):
            m_c = i + o_c < channels
            b_means = segment_mean(
                p_x, p_weights, p_norm, p_members, b_begin, b_size, most, i + o_c, channels, s_xn,
                WEIGHTS, False, BLOCK_M, 1, UNROLL,
            )  # fmt: skip
            b_mean = add_long_means(
                b_means[0], p_x, p_weights, p_norm, p_members, b_begin, tl.where(m_huge, 0, b_size), i + o_c, m_c,
                s_xn, WEIGHTS, False, BLOCK_M,
            )  # fmt: skip
            b_huge = tl.load(p_own_huge + i, mask=m_huge[:, None] & m_c[None, :], other=0.0)
            b_mean = tl.where(m_huge[:, None], b_huge, b_mean)
            if step == 0:
                b_squares = tl.fma(b_mean, b_mean, b_squares)
            else:
                b_y = b_mean * b_ratio[:, None]
                tl.store(p_out + i, b_y.to(p_y.dtype.element_ty), mask=m_m[:, None] & m_c[None, :])
        if step == 0:
            b_length = tl.sqrt_rn(tree_sum(b_squares, LOG2_CHANNELS))
            b_largest = largest_norm(p_norm, p_members, b_begin, b_size, BLOCK_M)
            b_ratio = tl.div_rn(b_largest, tl.where(b_length == 0.0, 1.0, b_length))


@triton.jit
def _huge_slots(
    p_x, p_weights, p_words, p_norm_weight, p_norm_bias, p_scale, p_shift, p_slot, p_offsets, p_members,
    p_y, n, channels, s_xn, s_yn, i_g, o_c, WEIGHTS: tl.constexpr, NORM: tl.constexpr, AFFINE: tl.constexpr,
    MODULATE: tl.constexpr, BY_SLOT: tl.constexpr,
):  # fmt: skip
    """Means of the huge slots of group i_g in channels o_c, stored in the row of the slot, or of its first position."""
    m_c = o_c < channels
    m_found, b_slot, b_begin, b_size = huge_slots(p_slot, p_offsets, p_members, n, i_g)
    o_p = tl.arange(0, POSITIONS)
    for i in range(0, tl.max(tl.where(m_found, o_p + 1, 0), 0)):
        size = tl.sum(tl.where(m_found & (o_p == i), b_size, 0), 0)
        if size > 0:
            begin = tl.sum(tl.where(o_p == i, b_begin, 0), 0)
            b_mean = huge_mean(p_x, p_weights, p_words, p_members, begin, size, o_c, m_c, s_xn, WEIGHTS, NORM)
            b_y = _affine(b_mean[None, :], p_norm_weight, p_norm_bias, p_scale, p_shift, o_c, m_c, AFFINE, MODULATE)
            row = tl.sum(tl.where(o_p == i, b_slot, 0), 0) if BY_SLOT else i_g * POSITIONS + i
            p_out = p_y + row * s_yn + o_c[None, :]
            tl.store(p_out, b_y.to(p_y.dtype.element_ty), mask=m_c[None, :])


@triton.jit(do_not_specialize=_INTEGERS)
def token_merge_kernel(
    p_x,
    p_slot,
    p_offsets,
    p_members,
    p_anchor,
    p_weights,
    p_words,
    p_huge,
    p_norm_weight,
    p_norm_bias,
    p_scale,
    p_shift,
    p_y,
    n,
    num_slots,
    units,
    plan_rows,
    spread,
    s_xb,
    s_xn,
    s_wb,
    s_ab,
    UNIT: tl.constexpr,
    FAR: tl.constexpr,
    MODE: tl.constexpr,
    WEIGHTS: tl.constexpr,
    NORM: tl.constexpr,
    AFFINE: tl.constexpr,
    MODULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCKS: tl.constexpr,
    UNROLL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (block of channels, block of slots, batch row). "mlerp" has one block of channels and loops over them.

    With "mean", the programs of the first `spread` blocks of slots look for huge slots besides: see `huge_slots`. With
    "mlerp" their means are in p_huge already. p_words are `norm_word`s of the tokens with NORM, and their norms with
    "mlerp". Channels and the strides of x, scale and shift count UNIT elements; FAR says that offsets within a batch
    row need 64 bits.
    """
    wait_for_predecessor(EARLY)
    i_c, i_m, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_p = i_b
    if i_b >= plan_rows:
        # A division, of some 20 instructions.
        i_p = i_b % plan_rows
    channels = units * UNIT
    s_xn, s_yn = _row(s_xn, UNIT, FAR), _row(units, UNIT, FAR)
    p_x += i_b * s_xb * UNIT
    p_weights += i_b * s_wb
    p_words += i_b * n
    p_slot += i_p * n
    p_members += i_p * n
    p_offsets += i_p * (num_slots + 1)
    p_anchor += i_p * num_slots
    p_scale += i_b * s_ab * UNIT
    p_shift += i_b * s_ab * UNIT
    p_y += i_b * num_slots * s_yn
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = i_c * CHANNELS * BLOCKS + tl.arange(0, CHANNELS)
    if MODE == "prune":
        b_token = tl.load(p_anchor + o_m, mask=o_m < num_slots, other=0)
        for _ in tl.static_range(BLOCKS):
            m_y = (o_m < num_slots)[:, None] & (o_c < channels)[None, :]
            b_y = tl.load(p_x + (b_token[:, None] * s_xn + o_c[None, :]), mask=m_y)
            tl.store(p_y + (o_m[:, None] * s_yn + o_c[None, :]), b_y, mask=m_y)
            o_c += CHANNELS
    elif MODE == "mlerp":
        p_huge += i_b * tl.cdiv(n, HUGE) * s_yn
        _mlerp_slots(
            p_x, p_weights, p_words, p_huge, p_offsets, p_members, p_y, num_slots, channels, s_xn, s_yn, o_m,
            o_c, WEIGHTS, BLOCK_M, UNROLL,
        )  # fmt: skip
    else:
        if i_m < spread:
            # The programs of one group share its channels.
            i_part, i_g = i_m % (PARTS * BLOCKS), i_m // (PARTS * BLOCKS)
            o_part = i_c * CHANNELS * BLOCKS + i_part * HUGE_CHANNELS + tl.arange(0, HUGE_CHANNELS)
            _huge_slots(
                p_x, p_weights, p_words, p_norm_weight, p_norm_bias, p_scale, p_shift, p_slot, p_offsets, p_members,
                p_y, n, channels, s_xn, s_yn, i_g, o_part, WEIGHTS, NORM, AFFINE, MODULATE, True,
            )  # fmt: skip
        if i_m * BLOCK_M < num_slots:
            _mean_slots(
                p_x, p_weights, p_words, p_norm_weight, p_norm_bias, p_scale, p_shift, p_offsets, p_members, p_y,
                num_slots, channels, s_xn, s_yn, i_m, o_m, o_c, WEIGHTS, NORM, AFFINE, MODULATE, BLOCK_M, BLOCKS,
                UNROLL,
            )  # fmt: skip


@triton.jit(do_not_specialize=["n", "num_slots", "units", "plan_rows", "s_xb", "s_xn"])
def huge_mean_kernel(
    p_x,
    p_slot,
    p_offsets,
    p_members,
    p_weights,
    p_huge,
    n,
    num_slots,
    units,
    plan_rows,
    s_xb,
    s_xn,
    s_wb,
    UNIT: tl.constexpr,
    FAR: tl.constexpr,
    WEIGHTS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (HUGE_CHANNELS channels, group of positions, batch row): means of the huge slots for "mlerp".

    p_huge is (B, positions, C) float32, contiguous, a row for each position divisible by HUGE. Rows whose position is
    not the first in a huge slot are left alone, and not read.
    """
    wait_for_predecessor(EARLY)
    i_c, i_g, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_p = i_b
    if i_b >= plan_rows:
        i_p = i_b % plan_rows
    channels = units * UNIT
    s_xn, s_hn = _row(s_xn, UNIT, FAR), _row(units, UNIT, FAR)
    p_x += i_b * s_xb * UNIT
    p_weights += i_b * s_wb
    p_members += i_p * n
    p_huge += i_b * tl.cdiv(n, HUGE) * s_hn
    p_slot += i_p * n
    p_offsets += i_p * (num_slots + 1)
    o_c = i_c * HUGE_CHANNELS + tl.arange(0, HUGE_CHANNELS)
    _huge_slots(
        p_x, p_weights, p_x, p_x, p_x, p_x, p_x, p_slot, p_offsets, p_members, p_huge, n, channels, s_xn, s_hn,
        i_g, o_c, WEIGHTS, False, False, False, False,
    )  # fmt: skip


def launch(
    x: Tensor,
    slot: Tensor,
    offsets: Tensor,
    members: Tensor,
    anchor: Tensor,
    mode: str,
    weights: Tensor | None,
    statistics: Tensor | None = None,
    affine: tuple[Tensor, Tensor] | None = None,
    modulation: tuple[Tensor, Tensor] | None = None,
    config: configs.Config | None = None,
) -> Tensor:
    """Both ops that merge: (B, N, C) tokens, unit last stride, to (B, M, C) slots.

    Args:
        x, slot, offsets, members, anchor, mode, weights, config: of `launch_token_merge`.
        statistics: what `launch_row_stats` says of x: norms for "mlerp", words for a norm.
        affine: norm_weight and norm_bias (C,) of a norm.
        modulation: scale and shift (B, C) of a norm.
    """
    batch, n, channels = x.shape
    num_slots = anchor.shape[1]
    y = torch.empty((batch, num_slots, channels), dtype=x.dtype, device=x.device)
    slot, offsets, members, anchor = (table.contiguous() for table in (slot, offsets, members, anchor))
    norm_weight, norm_bias = (x, x) if affine is None else (each.contiguous() for each in affine)
    scale, shift = (x, x) if modulation is None else (unit_last_stride(each) for each in modulation)
    if scale.stride(0) != shift.stride(0):
        scale, shift = scale.contiguous(), shift.contiguous()
    weights = x if weights is None else unit_last_stride(weights)
    config = config or configs.pick("token_merge", x.device, x.numel() * x.element_size())
    if x.element_size() == 4:
        # As many bytes in flight as of 16-bit tokens.
        config = {**config, "BLOCKS": 1, "UNROLL": 4}
    s_ab = 0 if modulation is None else shift.stride(0)
    unit = unit_of(channels, x.stride(0), x.stride(1), s_ab)
    far = max(n * x.stride(1), n * channels) >= 2**31
    # The largest slot has at most N - M + 1 members.
    groups = cdiv(n, HUGE.value * POSITIONS.value) if n - num_slots + 1 >= HUGE.value else 0
    spread = groups * PARTS.value * config["BLOCKS"] if mode == "mean" else 0
    huge = x
    if mode == "mlerp" and groups:
        huge = torch.empty((batch, cdiv(n, HUGE.value), channels), dtype=torch.float32, device=x.device)
        programs(huge_mean_kernel, cdiv(channels, HUGE_CHANNELS.value), groups, batch)(
            p_x=x,
            p_slot=slot,
            p_offsets=offsets,
            p_members=members,
            p_weights=weights,
            p_huge=huge,
            n=n,
            num_slots=num_slots,
            units=channels // unit,
            plan_rows=offsets.shape[0],
            s_xb=x.stride(0) // unit,
            s_xn=x.stride(1) // unit,
            s_wb=weights.stride(0),
            UNIT=unit,
            FAR=far,
            WEIGHTS=weights is not x,
            **configs.pick("huge_mean", x.device, x.numel() * x.element_size()),
            **early(x.device),
            **EXACT,
        )
    blocks = 1 if mode == "mlerp" else cdiv(channels, CHANNELS.value * config["BLOCKS"])
    programs(token_merge_kernel, blocks, max(spread, cdiv(num_slots, config["BLOCK_M"])), batch)(
        p_x=x,
        p_slot=slot,
        p_offsets=offsets,
        p_members=members,
        p_anchor=anchor,
        p_weights=weights,
        p_words=x if statistics is None else statistics,
        p_huge=huge,
        p_norm_weight=norm_weight,
        p_norm_bias=norm_bias,
        p_scale=scale,
        p_shift=shift,
        p_y=y,
        n=n,
        num_slots=num_slots,
        units=channels // unit,
        plan_rows=offsets.shape[0],
        spread=spread,
        s_xb=x.stride(0) // unit,
        s_xn=x.stride(1) // unit,
        s_wb=weights.stride(0),
        s_ab=s_ab // unit,
        UNIT=unit,
        FAR=far,
        MODE=mode,
        WEIGHTS=weights is not x,
        NORM=statistics is not None and mode == "mean",
        AFFINE=affine is not None,
        MODULATE=modulation is not None,
        **config,
        **early(x.device),
        **EXACT,
    )
    return y


def launch_token_merge(
    x: Tensor,
    slot: Tensor,
    offsets: Tensor,
    members: Tensor,
    anchor: Tensor,
    mode: str = "mean",
    weights: Tensor | None = None,
    config: configs.Config | None = None,
) -> Tensor:
    """(B, N, C) tokens to (B, M, C) slots by tables of P rows.

    One launch with "mean" and "prune", two or (where a slot may be huge) three with "mlerp".

    Args:
        x: (B, N, C).
        slot, offsets, members, anchor: (P, N), (P, M + 1), (P, N), (P, M) int32; P divides B.
        mode: "mean", "mlerp" or "prune".
        weights: (B, N) weights of the tokens, or None.
        config: a candidate of `token_merge`.
    """
    x = unit_last_stride(x)
    if x.shape[0] * anchor.shape[1] * x.shape[2] == 0:
        return torch.empty((x.shape[0], anchor.shape[1], x.shape[2]), dtype=x.dtype, device=x.device)
    statistics = launch_row_stats(x, "norm") if mode == "mlerp" else None
    return launch(x, slot, offsets, members, anchor, mode, weights, statistics, config=config)
