"""The smoothest token of each tile (L-GTM), from scores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import EXACT, INT_MIN, ordered_key, pack, unit_last_stride, unpack_index
from .early import early, wait_for_predecessor
from .launching import power_of_2, programs

# A program holds the scores of a row of tiles. Up to so many there are registers for them, in 16 warps.
MOST_SCORES = 32_768


# Rows of a tile up to which the loop over them is unrolled.
_UNROLLED = tl.constexpr(16)


@triton.jit
def _rank_row(b_rank, b_before, b_row, m_tile, row):
    """Ranks the tiles whose token lies in a row behind the b_before of the rows above; with the new b_before."""
    b_here = (m_tile & (b_row == row)).to(tl.int32)
    b_rank = tl.where(b_row == row, b_before + tl.cumsum(b_here, 0) - 1, b_rank)
    return b_rank, b_before + tl.sum(b_here, 0)


@triton.jit(do_not_specialize=["height", "width"])
def select_destinations_kernel(
    p_score,
    p_destinations,
    height,
    width,
    s_sb,
    SY: tl.constexpr,
    SX: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_X: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A program owns one row of tiles; BLOCK_X is at least the number of tiles in it."""
    wait_for_predecessor(EARLY)
    i_y, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tiles_x = width // SX
    o_tile, o_in = tl.arange(0, BLOCK_X), tl.arange(0, TILE)
    m_tile = o_tile < tiles_x
    m_t = m_tile[:, None] & (o_in < SY * SX)[None, :]
    o_n = (i_y * SY + o_in // SX)[None, :] * width + o_tile[:, None] * SX + (o_in % SX)[None, :]
    b_score = tl.load(p_score + i_b * s_sb + o_n, mask=m_t, other=0.0)
    b_key = ordered_key(-tl.where(b_score == b_score, b_score, float("inf")))
    b_order = pack(tl.where(m_t, b_key, INT_MIN), tl.broadcast_to(o_in[None, :], (BLOCK_X, TILE)))
    b_chosen = unpack_index(tl.max(b_order, axis=1))
    # Ascending order: by row inside the tiles, then by tile. The rank of a tile is what comes before it.
    b_row = b_chosen // SX
    b_rank = tl.zeros((BLOCK_X,), tl.int32)
    b_before = tiles_x * 0
    if SY <= _UNROLLED:
        for row in tl.static_range(SY):
            b_rank, b_before = _rank_row(b_rank, b_before, b_row, m_tile, row)
    else:
        for row in range(0, SY):
            b_rank, b_before = _rank_row(b_rank, b_before, b_row, m_tile, row)
    b_token = (i_y * SY + b_row) * width + o_tile * SX + b_chosen % SX
    p_row = p_destinations + (i_b * (height // SY) + i_y) * tiles_x
    tl.store(p_row + b_rank, b_token, mask=m_tile)


def scores_of_a_program(grid: tuple[int, int], stride: tuple[int, int]) -> int:
    """How many scores the tiles of one row have, each rounded up; of tiles larger than the grid there are none."""
    if stride[0] > grid[0] or stride[1] > grid[1]:
        return 0
    return power_of_2(grid[1] // stride[1]) * power_of_2(stride[0] * stride[1])


def launch_select_destinations(score: Tensor, grid: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """The lowest score of each tile, ascending: score (B, N) float32 to (B, D) int32; one launch."""
    score = unit_last_stride(score)
    (height, width), (sy, sx) = grid, stride
    tiles_y, tiles_x = height // sy, width // sx
    destinations = torch.empty((score.shape[0], tiles_y * tiles_x), dtype=torch.int32, device=score.device)
    if destinations.numel():
        programs(select_destinations_kernel, tiles_y, score.shape[0])(
            p_score=score,
            p_destinations=destinations,
            height=height,
            width=width,
            s_sb=score.stride(0),
            SY=sy,
            SX=sx,
            TILE=power_of_2(sy * sx),
            BLOCK_X=power_of_2(tiles_x),
            # Long rows of tiles take more, lest a thread hold more than 16.
            num_warps=min(max(scores_of_a_program(grid, stride) // 2048, 4), 16),
            **EXACT,
            **early(score.device),
        )
    return destinations
