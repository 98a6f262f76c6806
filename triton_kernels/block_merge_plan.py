"""From tile scores to the tables of a MergePlan (adaptive block merging), in one launch: plan_tables.py says how."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bigain_kernels.declaration import Tables
from bigain_kernels.tokens import merged_tiles

from . import configs
from ._common import INT_MIN, check_tokens, ordered_key, unit_last_stride
from .early import wait_for_predecessor
from .launching import programs
from .plan_tables import (
    SCRATCH,
    count_member,
    empty_tables,
    is_merged,
    load_order,
    options,
    order_of,
    parts_of,
    scratch,
    threshold,
    write_tables,
)


@triton.jit
def _tile_order(p_score, o_tile, tiles, tiles_x, width, SY: tl.constexpr, SX: tl.constexpr, REDUCE: tl.constexpr):
    """What a block of tiles is ordered by, the lowest score first; behind the last, what never merges."""
    m_tile = o_tile < tiles
    o_first = (o_tile // tl.maximum(tiles_x, 1)) * SY * width + (o_tile % tl.maximum(tiles_x, 1)) * SX
    b_value = tl.load(p_score + o_first, mask=m_tile, other=0.0)
    m_nan = b_value != b_value
    b_mean = b_value
    if REDUCE == "std":
        b_mean = tl.zeros(b_value.shape, tl.float32)
        for j in range(0, SY * SX):
            b_mean += tl.load(p_score + o_first + j // SX * width + j % SX, mask=m_tile, other=0.0)
        b_mean = tl.div_rn(b_mean, SY * SX * 1.0)
        b_value = (b_value - b_mean) * (b_value - b_mean)
    for j in range(1, SY * SX):
        b_next = tl.load(p_score + o_first + j // SX * width + j % SX, mask=m_tile, other=0.0)
        m_nan = m_nan | (b_next != b_next)
        if REDUCE == "max":
            b_value = tl.maximum(b_value, b_next)
        elif REDUCE == "min":
            b_value = tl.minimum(b_value, b_next)
        elif REDUCE == "std":
            b_value += (b_next - b_mean) * (b_next - b_mean)
        else:
            b_value += b_next
    # The order of sums is the order of means, and the order of variances that of standard deviations.
    b_value = tl.where(m_nan | (b_value != b_value), float("inf"), b_value)
    return order_of(tl.where(m_tile, ordered_key(-b_value), INT_MIN))


@triton.jit
def _assignments(p_flags, o_n, n, tiles_y, tiles_x, width, SY: tl.constexpr, SX: tl.constexpr):
    """The tokens that represent a block of tokens: the first of a tile whose flag is set, else themselves."""
    o_tile_y, o_tile_x = o_n // width // SY, o_n % width // SX
    m_real = (o_n < n) & (o_tile_y < tiles_y) & (o_tile_x < tiles_x)
    b_flag = tl.load(p_flags + o_tile_y * tiles_x + o_tile_x, mask=m_real, other=0)
    return tl.where(b_flag != 0, o_tile_y * SY * width + o_tile_x * SX, o_n)


@triton.jit(do_not_specialize=["height", "width", "count", "own"])
def block_merge_plan_kernel(
    p_score,
    p_work,
    p_slot,
    p_offsets,
    p_members,
    p_anchor,
    height,
    width,
    count,
    own,
    s_sb,
    SY: tl.constexpr,
    SX: tl.constexpr,
    REDUCE: tl.constexpr,
    SINGLE: tl.constexpr,
    HISTOGRAM: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (part of the tokens, `own` of them; row): the `count` tiles of the lowest reduced score merge whole.
    p_work has SCRATCH words for each program and token of whole blocks."""
    wait_for_predecessor(EARLY)
    i_part, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n = height * width
    tiles_y, tiles_x = height // SY, width // SX
    tiles = tiles_y * tiles_x
    num_slots = n - count * (SY * SX - 1)
    first = i_part * own
    last = tl.minimum(first + own, n)
    p_score += i_b * s_sb
    blocks = tl.cdiv(n, BLOCK)
    p_work += (i_b * tl.num_programs(0) + i_part) * (blocks * BLOCK * SCRATCH)
    p_assign, p_count = p_work + blocks * BLOCK, p_work + blocks * BLOCK * 2
    p_slot += i_b * n
    p_members += i_b * n
    p_offsets += i_b * (num_slots + 1)
    p_anchor += i_b * num_slots
    o_t = tl.arange(0, BLOCK)
    tile_blocks = tl.cdiv(tiles, BLOCK)
    b_order = _tile_order(p_score, o_t, tiles, tiles_x, width, SY, SX, REDUCE)
    if not SINGLE:
        for i in range(0, tile_blocks):
            b_load = _tile_order(p_score, i * BLOCK + o_t, tiles, tiles_x, width, SY, SX, REDUCE)
            tl.store(p_work + i * BLOCK + o_t, b_load.to(tl.int32, bitcast=True))
        tl.debug_barrier()
    equal, limit = threshold(b_order, p_work, tile_blocks, count, SINGLE, HISTOGRAM, BLOCK)
    # Flags of the tiles that merge, in the place of what orders them.
    for i in range(0, tile_blocks):
        o_tile = i * BLOCK + o_t
        if not SINGLE:
            b_order = load_order(p_work, o_tile)
        tl.store(p_work + o_tile, is_merged(b_order, o_tile, equal, limit).to(tl.int32))
    tl.debug_barrier()
    b_assign = o_t
    if SINGLE:
        b_assign = _assignments(p_work, o_t, n, tiles_y, tiles_x, width, SY, SX)
    else:
        for i in range(0, blocks):
            o_n = i * BLOCK + o_t
            tl.store(p_assign + o_n, _assignments(p_work, o_n, n, tiles_y, tiles_x, width, SY, SX))
            tl.store(p_count + o_n, tl.zeros((BLOCK,), tl.int32))
        tl.debug_barrier()
        for i in range(0, blocks):
            o_n = i * BLOCK + o_t
            count_member(p_count, tl.load(p_assign + o_n), o_n, first)
        tl.debug_barrier()
    write_tables(
        b_assign, p_assign, p_count, p_work, p_slot, p_offsets, p_members, p_anchor, n, num_slots, first, last,
        SINGLE, HISTOGRAM, TOKENS, BLOCK,
    )  # fmt: skip


def launch_block_merge_plan(
    score: Tensor,
    grid: tuple[int, int],
    stride: tuple[int, int],
    r: int,
    reduce: str,
    config: configs.Config | None = None,
) -> Tables:
    """Tables of the plan that merges the smoothest whole tiles of score (P, N) float32, at most r tokens; one launch.

    "max" and "min" are exact. "sum", "mean" and "std" are accumulated in float32, in row-major order inside a tile.
    """
    score = unit_last_stride(score)
    rows, n = score.shape
    check_tokens(n)
    count = merged_tiles(grid, stride, r)
    tables = empty_tables(rows, n, n - count * (stride[0] * stride[1] - 1), score.device)
    # Of tiles larger than the grid there are none, however large they are; the kernel counts in 32 bits.
    stride = (min(stride[0], grid[0] + 1), min(stride[1], grid[1] + 1))
    if rows * n:
        constants = options(n, score.device, config)
        parts, own = parts_of(n, rows, score.device, constants)
        work = scratch(rows, n, parts, constants, score.device)
        constants.pop("PARTS", None)
        programs(block_merge_plan_kernel, parts, rows)(
            p_score=score,
            p_work=work,
            p_slot=tables[0],
            p_offsets=tables[1],
            p_members=tables[2],
            p_anchor=tables[3],
            height=grid[0],
            width=grid[1],
            count=count,
            own=own,
            s_sb=score.stride(0),
            SY=stride[0],
            SX=stride[1],
            REDUCE=reduce,
            **constants,
        )
    else:
        tables[1].zero_()
    return tables
