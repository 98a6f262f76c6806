"""Laplacian scores, inverse norms and the smoothest token of each tile, in one pass over the tokens (L-GTM)."""

# Triton does not unpack tuples into others.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from ._common import (
    EXACT,
    INT_MIN,
    add_squares,
    destination_word,
    divide_by_constant,
    inverse_norm,
    norm_step,
    ordered_key,
    pack,
    side_by_side,
    to_float32,
    tree_sum,
    unit_last_stride,
    unit_of,
    unpack_index,
)
from .early import early, wait_for_predecessor
from .launching import cdiv, power_of_2, programs, workspace

# What a byte of tokens counts in the measure of configs.pick: a launch is "large" from 8 MiB on, where there are enough
# threads to hide what they wait for although each has more to do.
_WORK = configs.LARGE >> 23


@triton.jit
def _load(p_x, m_x):
    """Values as float32, 0 where they are masked; m_x may be None."""
    # LLVM takes the lines of a load's assembly, five where there is no mask, for lines of the source. The statement has
    # as many, so that the report finds it there.
    b_x = tl.load(
        p_x,
        mask=m_x,
        other=None if m_x is None else 0.0,
    )
    return to_float32(b_x)


@triton.jit
def _load_mean(p_x, o_x, m_x, s_share, SHARE: tl.constexpr):
    """Values at o_x, averaged over the SHARE rows that lie s_share apart and rounded to the dtype of x, as float32."""
    b_sum = _load(p_x + o_x, m_x)
    if SHARE == 1:
        return b_sum
    for _ in tl.static_range(1, SHARE):
        # One step after the other: a multiple of s_share may pass 2^31.
        p_x += s_share
        b_sum += _load(p_x + o_x, m_x)
    return divide_by_constant(b_sum, SHARE).to(p_x.dtype.element_ty).to(tl.float32)


@triton.jit
def _both(m_first, m_second):
    """Both masks; the second may be None."""
    return m_first if m_second is None else m_first & m_second


@triton.jit
def _add_norm(b_sum, b_x, LANES: tl.constexpr, LOG2_VECTOR: tl.constexpr, L2: tl.constexpr):
    """b_sum (ROWS, LANES) plus what b_x (ROWS, STEP) adds to a squared L2 norm, or to an L1 norm."""
    if L2:
        return add_squares(b_sum, b_x, LANES, LOG2_VECTOR)
    ROWS: tl.constexpr = b_x.shape[0]
    b_own = tree_sum(tl.reshape(tl.abs(b_x), (ROWS * LANES, 2**LOG2_VECTOR)), LOG2_VECTOR)
    return b_sum + tl.reshape(b_own, (ROWS, LANES))


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
    EVEN: tl.constexpr,
    LOG2_LANES: tl.constexpr,
    LOG2_VECTOR: tl.constexpr,
    LOG2_TOKENS: tl.constexpr,
    PATCH_Y: tl.constexpr,
    PATCH_X: tl.constexpr,
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

    A thread has 16 bytes of the channels of PATCH_Y x PATCH_X tokens, which divide tiles and grid: it reads each token
    once that several of them need, 12 instead of 20 for 2 x 2. Channels and strides count UNIT elements; FAR says that
    offsets need 64 bits; EVEN that a step of channels divides them. With TIMES a row of the grid of programs is one of
    several frames, and their neighbours in time count too.

    A lane adds up its channels in one order, whatever the patch, and `tree_sum` the lanes.
    """
    wait_for_predecessor(EARLY)
    i_x, i_y, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n = height * width
    channels = units * UNIT
    TILES: tl.constexpr = TILES_Y * TILES_X
    TOKENS: tl.constexpr = PATCH_Y * PATCH_X
    PATCHES: tl.constexpr = TILES * TILE // TOKENS
    STATS: tl.constexpr = 2 if SELECT else 1
    LANES: tl.constexpr = 2**LOG2_LANES
    STEP: tl.constexpr = 2 ** (LOG2_LANES + LOG2_VECTOR)
    WIDE: tl.constexpr = PATCH_X + 2
    ACROSS: tl.constexpr = SX // PATCH_X

    # Patches of the program, tile by tile; those outside of the grid read its last ones, so that no mask is needed.
    o_p = tl.arange(0, PATCHES)
    o_tile, o_in = o_p // (TILE // TOKENS), o_p % (TILE // TOKENS)
    o_row = (i_y * TILES_Y + o_tile // TILES_X) * SY + o_in // ACROSS * PATCH_Y
    o_column = (i_x * TILES_X + o_tile % TILES_X) * SX + o_in % ACROSS * PATCH_X
    m_own = ((o_in < SY * SX // TOKENS) & (o_row < height) & (o_column < width))[:, None]
    o_row, o_column = tl.minimum(o_row, height - PATCH_Y), tl.minimum(o_column, width - PATCH_X)
    o_c = tl.arange(0, STEP)
    s_n = tl.cast(s_xn, tl.int64 if FAR else tl.int32) * UNIT
    o_x = (o_row * width + o_column)[:, None] * s_n + o_c[None, :]
    if TIMES:
        i_frame = i_b % frames
        s_frame = n * s_n.to(tl.int64)
        p_x += i_b // frames * s_xb * UNIT + i_frame * s_frame
        # A frame that is not there is the frame itself.
        s_before, s_after = tl.where(i_frame > 0, s_frame, 0), tl.where(i_frame + 1 < frames, s_frame, 0)
    else:
        p_x += i_b * s_xb * UNIT
    s_share = tl.cast(s_share, tl.int64) * UNIT
    m_up, m_down = (o_row > 0)[:, None], (o_row + PATCH_Y < height)[:, None]
    m_left, m_right = (o_column > 0)[:, None], (o_column + PATCH_X < width)[:, None]
    s_n = s_n.to(tl.int64)
    s_row = width * s_n

    b_sums = ()
    for _ in tl.static_range(STATS * TOKENS):
        b_sums = b_sums + (tl.zeros((PATCHES, LANES), tl.float32),)
    for i_c in range(0, channels, STEP):
        m_c = None if EVEN else (i_c + o_c < channels)[None, :]
        p_c = p_x + i_c
        # The patch, with the row above and the one below and the tokens at its sides; nothing reads the corners. All
        # loads first.
        b_x = (o_c,)
        for j in tl.static_range(PATCH_X):
            b_x = b_x + (_load_mean(p_c - s_row + j * s_n, o_x, _both(m_up, m_c), s_share, SHARE),)
        b_x = b_x + (o_c,)
        for i in tl.static_range(PATCH_Y):
            p_i = p_c + i * s_row
            b_x = b_x + (_load_mean(p_i - s_n, o_x, _both(m_left, m_c), s_share, SHARE),)
            for j in tl.static_range(PATCH_X):
                b_x = b_x + (_load_mean(p_i + j * s_n, o_x, m_c, s_share, SHARE),)
            b_x = b_x + (_load_mean(p_i + PATCH_X * s_n, o_x, _both(m_right, m_c), s_share, SHARE),)
        b_x = b_x + (o_c,)
        for j in tl.static_range(PATCH_X):
            p_j = p_c + PATCH_Y * s_row + j * s_n
            b_x = b_x + (_load_mean(p_j, o_x, _both(m_down, m_c), s_share, SHARE),)
        b_more = ()
        for i in tl.static_range(PATCH_Y):
            for j in tl.static_range(PATCH_X):
                # Two neighbours and two: a pair that two tokens of the patch have in common is added up once.
                b_here = b_x[(i + 1) * WIDE + j + 1]
                b_before = b_x[i * WIDE + j + 1] + b_x[(i + 1) * WIDE + j]
                b_after = b_x[(i + 1) * WIDE + j + 2] + b_x[(i + 2) * WIDE + j + 1]
                b_response = tl.fma(b_here, 4.0, -b_before) - b_after
                if TIMES:
                    p_t = p_c + i * s_row + j * s_n
                    b_response += b_here - _load_mean(p_t - s_before, o_x, m_c, s_share, SHARE)
                    b_response += b_here - _load_mean(p_t + s_after, o_x, m_c, s_share, SHARE)
                b_own = _add_norm(b_sums[STATS * (i * PATCH_X + j)], b_response, LANES, LOG2_VECTOR, L2)
                b_more = b_more + (b_own,)
                if SELECT:
                    b_own = add_squares(b_sums[STATS * (i * PATCH_X + j) + 1], b_here, LANES, LOG2_VECTOR)
                    b_more = b_more + (b_own,)
                    if SHARE > 1:
                        o_mean = (i_b * n + (o_row + i) * width + o_column + j)[:, None] * channels
                        tl.store(
                            p_mean + o_mean + i_c + o_c[None, :],
                            b_here.to(p_mean.dtype.element_ty),
                            mask=_both(m_own, m_c),
                        )
        b_sums = b_more
    # By token: the score, and the square of the norm.
    b_all = tl.reshape(side_by_side(b_sums, LOG2_TOKENS + STATS - 1), (PATCHES, LANES, STATS * TOKENS))
    b_all = tree_sum(tl.reshape(tl.permute(b_all, (0, 2, 1)), (PATCHES * STATS * TOKENS, LANES)), LOG2_LANES)
    if SELECT:
        b_score, b_squares = tl.split(tl.reshape(b_all, (TILES * TILE, 2)))
    else:
        b_score = b_all

    # Tokens of the program, tile by tile; the tiles at the far edges may be cut or lie outside.
    real_y, real_x = height // SY, width // SX
    o_t = tl.arange(0, TILES * TILE)
    o_tile, o_in = o_t // TILE, o_t % TILE // TOKENS
    o_tile_y = i_y * TILES_Y + o_tile // TILES_X
    o_tile_x = i_x * TILES_X + o_tile % TILES_X
    o_in_y = o_in // ACROSS * PATCH_Y + o_t % TOKENS // PATCH_X
    o_in_x = o_in % ACROSS * PATCH_X + o_t % PATCH_X
    o_in = o_in_y * SX + o_in_x
    o_row, o_column = o_tile_y * SY + o_in_y, o_tile_x * SX + o_in_x
    m_t = (o_in < SY * SX) & (o_row < height) & (o_column < width)
    o_n = o_row * width + o_column
    if L2:
        b_score = tl.sqrt_rn(b_score)
    if not SELECT:
        tl.store(p_score + i_b * n + o_n, b_score, mask=m_t)

    if SELECT:
        b_inverse_norm = inverse_norm(b_squares)
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
    config = config or configs.pick("laplacian_score", x.device, x.numel() // share * x.element_size() * _WORK)
    (height, width), (sy, sx) = grid, stride
    tile, step = power_of_2(sy * sx), norm_step(channels)
    vector, patch = 16 // x.element_size(), config["PATCH"]
    patch_y = patch if height % patch == 0 and sy % patch == 0 else 1
    patch_x = patch if width % patch == 0 and sx % patch == 0 else 1
    # Large tiles leave room for fewer of them in a program, wide steps too.
    tiles = max(config["VECTORS"] * vector // (tile * step), 1).bit_length() - 1
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
        EVEN=channels % step == 0,
        LOG2_LANES=(step // vector).bit_length() - 1,
        LOG2_VECTOR=vector.bit_length() - 1,
        LOG2_TOKENS=(patch_y * patch_x).bit_length() - 1,
        PATCH_Y=patch_y,
        PATCH_X=patch_x,
        SY=sy,
        SX=sx,
        TILE=tile,
        SHARE=share,
        L2=l2,
        SELECT=select,
        TIMES=frames > 1,
        TILES_Y=tiles_y,
        TILES_X=tiles_x,
        **{name: value for name, value in config.items() if name not in ("VECTORS", "PATCH")},
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
