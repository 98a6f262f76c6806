"""From tile scores to the tables of a MergePlan (adaptive block merging): one launch, one program per row.

The tables are made as those of `merge_plan`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bigain_kernels.tokens import merged_tiles

from . import configs
from ._common import INT_MIN, check_tokens, ordered_key, unit_last_stride
from .launching import programs
from .merge_plan import Tables, blocks, empty_tables, threshold, write_tables


@triton.jit(do_not_specialize=["height", "width", "count"])
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
    s_sb,
    SY: tl.constexpr,
    SX: tl.constexpr,
    REDUCE: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program plans one row: the `count` tiles of the lowest reduced score merge whole. p_work is (P, 4 N) int32."""
    i_b = tl.program_id(0).to(tl.int64)
    n = height * width
    tiles_y, tiles_x = height // SY, width // SX
    tiles = tiles_y * tiles_x
    num_slots = n - count * (SY * SX - 1)
    p_score += i_b * s_sb
    p_work += i_b * n * 4
    p_keys, p_assign = p_work + 2 * n, p_work + 3 * n
    p_slot += i_b * n
    p_members += i_b * n
    p_offsets += i_b * (num_slots + 1)
    p_anchor += i_b * num_slots
    o_t = tl.arange(0, BLOCK)
    for i in range(0, tl.cdiv(tiles, BLOCK)):
        o_tile = i * BLOCK + o_t
        m_tile = o_tile < tiles
        o_first = (o_tile // tl.maximum(tiles_x, 1)) * SY * width + (o_tile % tl.maximum(tiles_x, 1)) * SX
        b_value = tl.load(p_score + o_first, mask=m_tile, other=0.0)
        m_nan = b_value != b_value
        b_mean = b_value
        if REDUCE == "std":
            b_mean = tl.zeros((BLOCK,), tl.float32)
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
        tl.store(p_keys + o_tile, ordered_key(-b_value), mask=m_tile)
    tl.debug_barrier()
    highest, ties = threshold(p_keys, tiles, count, SINGLE, BLOCK)
    before = tiles * 0
    for i in range(0, tl.cdiv(tiles, BLOCK)):
        o_tile = i * BLOCK + o_t
        m_tile = o_tile < tiles
        b_key = tl.load(p_keys + o_tile, mask=m_tile, other=INT_MIN)
        m_tie = m_tile & (b_key == highest)
        b_rank = before + tl.cumsum(m_tie.to(tl.int32), 0)
        m_merged = m_tile & ((b_key > highest) | (m_tie & (b_rank <= ties)))
        tl.store(p_work + o_tile, m_merged.to(tl.int32), mask=m_tile)
        before += tl.sum(m_tie.to(tl.int32), 0)
    tl.debug_barrier()
    for i in range(0, tl.cdiv(n, BLOCK)):
        o_n = i * BLOCK + o_t
        m_n = o_n < n
        o_tile_y, o_tile_x = o_n // width // SY, o_n % width // SX
        m_real = m_n & (o_tile_y < tiles_y) & (o_tile_x < tiles_x)
        b_merged = tl.load(p_work + o_tile_y * tiles_x + o_tile_x, mask=m_real, other=0)
        tl.store(p_assign + o_n, tl.where(b_merged != 0, o_tile_y * SY * width + o_tile_x * SX, o_n), mask=m_n)
    tl.debug_barrier()
    write_tables(p_assign, p_work, p_slot, p_offsets, p_members, p_anchor, n, num_slots, BLOCK)


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
    tables, work = empty_tables(rows, n, n - count * (stride[0] * stride[1] - 1), score.device)
    # Of tiles larger than the grid there are none, however large they are; the kernel counts in 32 bits.
    stride = (min(stride[0], grid[0] + 1), min(stride[1], grid[1] + 1))
    if rows * n:
        programs(block_merge_plan_kernel, rows)(
            p_score=score,
            p_work=work,
            p_slot=tables[0],
            p_offsets=tables[1],
            p_members=tables[2],
            p_anchor=tables[3],
            height=grid[0],
            width=grid[1],
            count=count,
            s_sb=score.stride(0),
            SY=stride[0],
            SX=stride[1],
            REDUCE=reduce,
            **blocks("merge_plan", n, score.device, config),
        )
    else:
        tables[1].zero_()
    return tables
