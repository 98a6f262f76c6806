"""Laplacian scores, inverse norms and the smoothest token of each tile, in one pass over the tokens (L-GTM)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from ._common import (
    EXACT,
    INT_MIN,
    UNIT,
    destination_word,
    divide_by_constant,
    inverse_norm,
    ordered_key,
    pack,
    step_of,
    to_float32,
    tree_sum,
    unit_last_stride,
    unit_of,
    unpack_index,
)
from .early import early, wait_for_predecessor
from .launching import cdiv, power_of_2, programs, workspace

# What a token counts in the measure of configs.pick: a launch is "large" from 16,384 tokens on.
_WORK = configs.LARGE >> 14
_WIDEST = 256


@triton.jit
def _load_mean(p_x, o_x, m_x, s_share, SHARE: tl.constexpr):
    """Values at o_x, averaged over the SHARE rows that lie s_share apart and rounded to the dtype of x, as float32."""
    b_sum = to_float32(tl.load(p_x + o_x, mask=m_x, other=0.0))
    if SHARE == 1:
        return b_sum
    for _ in tl.static_range(1, SHARE):
        # One step after the other: a multiple of s_share may pass 2^31.
        p_x += s_share
        b_sum += to_float32(tl.load(p_x + o_x, mask=m_x, other=0.0))
    return divide_by_constant(b_sum, SHARE).to(p_x.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=["height", "width", "frames", "units", "s_xb", "s_xn", "s_share"])
def laplacian_score_kernel(
    p_x,
    p_score,
    p_inverse_norm,
    p_destinations,
    p_words,
    p_sources,
    p_packed,
    p_mean,
    height,
    width,
    frames,
    units,
    s_xb,
    s_xn,
    s_share,
    UNIT: tl.constexpr,
    FAR: tl.constexpr,
    STEP: tl.constexpr,
    LOG2_STEP: tl.constexpr,
    SY: tl.constexpr,
    SX: tl.constexpr,
    TILE: tl.constexpr,
    SHARE: tl.constexpr,
    L2: tl.constexpr,
    SELECT: tl.constexpr,
    TIMES: tl.constexpr,
    TILES_Y: tl.constexpr,
    TILES_X: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A program owns TILES_Y x TILES_X tiles of SY x SX tokens; TILE is SY * SX rounded up to a power of two.

    Each step is STEP channels. Channels and strides count UNIT elements; FAR says that offsets need 64 bits. With
    TIMES a row of the grid of programs is one of several frames, and their neighbours in time count too.
    """
    wait_for_predecessor(EARLY)
    i_x, i_y, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n = height * width
    channels = units * UNIT
    real_y, real_x = height // SY, width // SX
    # Tokens of the program, tile by tile; the tiles at the far edges may be cut or lie outside.
    o_t = tl.arange(0, TILES_Y * TILES_X * TILE)
    o_tile, o_in = o_t // TILE, o_t % TILE
    o_tile_y = i_y * TILES_Y + o_tile // TILES_X
    o_tile_x = i_x * TILES_X + o_tile % TILES_X
    o_row = o_tile_y * SY + o_in // SX
    o_column = o_tile_x * SX + o_in % SX
    m_t = (o_in < SY * SX) & (o_row < height) & (o_column < width)
    o_n = o_row * width + o_column
    o_c = tl.arange(0, STEP)
    s_n = tl.cast(s_xn, tl.int64 if FAR else tl.int32) * UNIT
    o_x = o_n[:, None] * s_n + o_c[None, :]
    if TIMES:
        i_frame = i_b % frames
        s_frame = n * s_n.to(tl.int64)
        p_x += i_b // frames * s_xb * UNIT + i_frame * s_frame
        # A frame that is not there is the frame itself.
        s_before, s_after = tl.where(i_frame > 0, s_frame, 0), tl.where(i_frame + 1 < frames, s_frame, 0)
    else:
        p_x += i_b * s_xb * UNIT
    s_share = tl.cast(s_share, tl.int64) * UNIT
    m_up, m_down = m_t & (o_row > 0), m_t & (o_row + 1 < height)
    m_left, m_right = m_t & (o_column > 0), m_t & (o_column + 1 < width)
    s_n = s_n.to(tl.int64)
    s_row = width * s_n

    b_response_sum = tl.zeros((TILES_Y * TILES_X * TILE, STEP), tl.float32)
    b_squares = tl.zeros((TILES_Y * TILES_X * TILE, STEP), tl.float32)
    for i_c in range(0, channels, STEP):
        m_c = (i_c + o_c < channels)[None, :]
        p_c = p_x + i_c
        b_x = _load_mean(p_c, o_x, m_t[:, None] & m_c, s_share, SHARE)
        b_response = tl.fma(b_x, 4.0, -_load_mean(p_c - s_row, o_x, m_up[:, None] & m_c, s_share, SHARE))
        b_response -= _load_mean(p_c + s_row, o_x, m_down[:, None] & m_c, s_share, SHARE)
        b_response -= _load_mean(p_c - s_n, o_x, m_left[:, None] & m_c, s_share, SHARE)
        b_response -= _load_mean(p_c + s_n, o_x, m_right[:, None] & m_c, s_share, SHARE)
        if TIMES:
            b_response += b_x - _load_mean(p_c - s_before, o_x, m_t[:, None] & m_c, s_share, SHARE)
            b_response += b_x - _load_mean(p_c + s_after, o_x, m_t[:, None] & m_c, s_share, SHARE)
        b_response_sum += b_response * b_response if L2 else tl.abs(b_response)
        if SELECT:
            b_squares = tl.fma(b_x, b_x, b_squares)
            if SHARE > 1:
                o_mean = (i_b * n + o_n)[:, None] * channels + i_c + o_c[None, :]
                tl.store(p_mean + o_mean, b_x.to(p_mean.dtype.element_ty), mask=m_t[:, None] & m_c)
    b_score = tree_sum(b_response_sum, LOG2_STEP)
    if L2:
        b_score = tl.sqrt_rn(b_score)
    if not SELECT:
        tl.store(p_score + i_b * n + o_n, b_score, mask=m_t)

    if SELECT:
        b_inverse_norm = inverse_norm(tree_sum(b_squares, LOG2_STEP))
        tl.store(p_inverse_norm + i_b * n + o_n, b_inverse_norm, mask=m_t)
        # The lowest (score, position): the highest (-score, lowest position). NaN counts as +inf.
        b_key = ordered_key(-tl.where(b_score == b_score, b_score, float("inf")))
        b_order = pack(tl.where(m_t, b_key, INT_MIN), o_in)
        b_best = tl.max(tl.reshape(b_order, (TILES_Y * TILES_X, TILE)), axis=1)
        b_chosen = unpack_index(b_best)
        o_own = tl.arange(0, TILES_Y * TILES_X)
        o_own_y, o_own_x = i_y * TILES_Y + o_own // TILES_X, i_x * TILES_X + o_own % TILES_X
        b_token = (o_own_y * SY + b_chosen // SX) * width + o_own_x * SX + b_chosen % SX
        m_own = (o_own_y < real_y) & (o_own_x < real_x)
        o_list = i_b * (real_y * real_x) + o_own_y * real_x + o_own_x
        tl.store(p_destinations + o_list, b_token, mask=m_own)

        # All other tokens are sources: first those of the tiles, then the right strip, then the bottom strip.
        b_chosen_each = tl.reshape(
            tl.broadcast_to(b_chosen[:, None], (TILES_Y * TILES_X, TILE)), (TILES_Y * TILES_X * TILE,)
        )
        m_real = (o_tile_y < real_y) & (o_tile_x < real_x)
        m_destination = m_real & (o_in == b_chosen_each)
        b_own_norm = tl.where(o_in == b_chosen_each, b_inverse_norm, 0.0)
        b_own_norm = tl.max(tl.reshape(b_own_norm, (TILES_Y * TILES_X, TILE)), axis=1)
        tl.store(p_words + o_list, destination_word(b_token, b_own_norm), mask=m_own)
        strip = width - real_x * SX
        o_tile_source = (o_tile_y * real_x + o_tile_x) * (SY * SX - 1) + o_in - (o_in > b_chosen_each).to(tl.int32)
        o_right = real_y * real_x * (SY * SX - 1) + o_row * strip + o_column - real_x * SX
        o_source = tl.where(m_real, o_tile_source, tl.where(o_tile_y < real_y, o_right, o_n - real_y * real_x))
        p_row = p_sources + i_b * (n - real_y * real_x)
        tl.store(p_row + o_source, o_n, mask=m_t & ~m_destination)
        # Destinations match themselves; sources start below every similarity.
        b_first = tl.where(m_destination, ordered_key(tl.full(o_n.shape, float("-inf"), tl.float32)), INT_MIN)
        tl.store(p_packed + i_b * n + o_n, pack(b_first, o_n), mask=m_t)


def _launch(
    x: Tensor,
    grid: tuple[int, int],
    stride: tuple[int, int],
    l2: bool,
    share: int,
    outputs: dict[str, Tensor],
    select: bool,
    config: configs.Config | None,
    frames: int = 1,
) -> None:
    rows, channels = x.shape[0] // share * frames, x.shape[2]
    if rows * x.shape[1] == 0:
        return
    # How many programs there are depends on the tokens, not on their bytes.
    config = config or configs.pick("laplacian_score", x.device, rows // frames * x.shape[1] * _WORK)
    (height, width), (sy, sx) = grid, stride
    tile, step = power_of_2(sy * sx), step_of(channels, _WIDEST)
    # Large tiles leave room for fewer of them in a program, wide steps too.
    tiles = max(config["VECTORS"] * UNIT // (tile * step), 1).bit_length() - 1
    tiles_y, tiles_x = 1 << tiles // 2, 1 << (tiles + 1) // 2
    blocks = (cdiv(cdiv(width, sx), tiles_x), cdiv(cdiv(height, sy), tiles_y), rows)
    unit = unit_of(channels, x.stride(0), x.stride(1))
    programs(laplacian_score_kernel, *blocks)(
        p_x=x,
        **outputs,
        height=height,
        width=width,
        frames=frames,
        units=channels // unit,
        s_xb=x.stride(0) // unit,
        s_xn=x.stride(1) // unit,
        s_share=rows * x.stride(0) // unit if share > 1 else 0,
        UNIT=unit,
        FAR=x.shape[1] * x.stride(1) >= 2**31,
        STEP=step,
        LOG2_STEP=step.bit_length() - 1,
        SY=sy,
        SX=sx,
        TILE=tile,
        SHARE=share,
        L2=l2,
        SELECT=select,
        TIMES=frames > 1,
        TILES_Y=tiles_y,
        TILES_X=tiles_x,
        **{name: value for name, value in config.items() if name != "VECTORS"},
        **early(x.device),
        **EXACT,
    )


def launch_laplacian_score(
    x: Tensor, grid: tuple[int, int], norm: str = "l1", frames: int = 1, config: configs.Config | None = None
) -> Tensor:
    """Score (B, N) float32 of every token of x (B, N, C), of as many frames; one launch."""
    x = unit_last_stride(x)
    score = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)
    unused = dict.fromkeys(("p_inverse_norm", "p_destinations", "p_words", "p_sources", "p_packed", "p_mean"), score)
    _launch(x, grid, (2, 2), norm == "l2", 1, {"p_score": score, **unused}, False, config, frames)
    return score


def launch_score_and_select(
    x: Tensor, grid: tuple[int, int], stride: tuple[int, int], share: int = 1, config: configs.Config | None = None
) -> dict[str, Tensor]:
    """The first launch of L-GTM: everything that matching needs, from one pass over x (k * P, N, C), k = share.

    Returns:
        inverse_norm (P, N) float32, 0 for a token without direction; destinations (P, D) int32
        in the order of the tiles (ascending from one row of tiles to the next); words (P, D) int64, their
        `destination_word`; sources (P, N - D) int32; packed
        (P, N) int64, `pack(-inf, itself)` at destinations and less than any similarity at sources; mean (P, N, C), the
        tokens averaged over the rows that share (x itself when k = 1).
    """
    x = unit_last_stride(x)
    rows, n, channels = x.shape[0] // share, x.shape[1], x.shape[2]
    d = (grid[0] // stride[0]) * (grid[1] // stride[1])

    inverse_norm, destinations, words, sources, packed = workspace(
        x.device,
        ((rows, n), torch.float32),
        ((rows, d), torch.int32),
        ((rows, d), torch.int64),
        ((rows, n - d), torch.int32),
        ((rows, n), torch.int64),
    )
    outputs = {
        "inverse_norm": inverse_norm,
        "destinations": destinations,
        "words": words,
        "sources": sources,
        "packed": packed,
        "mean": x if share == 1 else torch.empty((rows, n, channels), dtype=x.dtype, device=x.device),
    }
    # Nobody reads the score itself: this launch does not write it.
    pointers = {"p_score": x, **{f"p_{k}": v for k, v in outputs.items()}}
    _launch(x, grid, stride, False, share, pointers, True, config)
    return outputs
