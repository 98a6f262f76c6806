"""Matching within a small window: every tile of sources with the few destinations near it, without tensor cores.

A warp has the sources of a tile side by side, and all destinations of the tiles within the window: with a window of one
tile and tiles of 2 x 2, three sources and nine destinations, twelve rows for 27 products. Each row is read once for all
of them, so that the time is that of reading; a tile on the tensor cores multiplies whole rows of tiles, of which it
throws most away.

Lanes have neighbouring channels, and each product is a sum a lane until all channels have passed. The order of a sum
follows from the number of channels and the dtype: in a lane, then over lanes by `tree_sum`. All in float32, so that
nothing has to be promoted.

Destinations are read in the order of their tiles. L-GTM lists them so, one a tile, and its sources by tile as well;
of any other list, `match_prepare` makes such an order and the table of where tiles begin.
"""

# Triton does not unpack tuples into others.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,misc,var-annotated"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from ._common import (
    EXACT,
    INT_MAX,
    destination_scale,
    destination_token,
    elements,
    ordered_key,
    pack,
    side_by_side,
    step_of,
    to_float32,
    tree_sum,
    unit_of,
)
from .early import early, wait_for_predecessor
from .launching import cdiv, power_of_2, programs
from .match_tiles import NOTHING

# The widest window, in tiles, and the most channels of a step.
WIDEST, _WIDEST_STEP = 1, 256
# Sources of a tile that are matched side by side: those of a tile of 2 x 2 tokens.
SOURCES = 3
_LEAST = tl.constexpr(-(1 << 63))


@triton.jit
def _dots(
    p_tokens,
    o_sources,
    o_near,
    channels,
    EVEN: tl.constexpr,
    STEP: tl.constexpr,
    LOG2_LANES: tl.constexpr,
    LOG2_VECTOR: tl.constexpr,
    LOG2_PLACES: tl.constexpr,
    SOURCES: tl.constexpr,
    NEAR: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Products of SOURCES rows with NEAR rows for each of BLOCK_T tiles, (BLOCK_T, 2 ** LOG2_PLACES): all sources of a
    destination, then those of the next."""
    LANES: tl.constexpr = 2**LOG2_LANES
    VECTOR: tl.constexpr = 2**LOG2_VECTOR
    o_c = tl.arange(0, STEP)
    b_sums = ()
    for _ in tl.static_range(2**LOG2_PLACES):
        b_sums = b_sums + (tl.zeros((BLOCK_T, LANES), tl.float32),)
    for i_c in range(0, channels, STEP):
        # All loads first.
        b_rows = ()
        for i in tl.static_range(SOURCES + NEAR):
            o_row = o_sources[i] if i < SOURCES else o_near[i - SOURCES]
            p_row = p_tokens + i_c + (o_row[:, None] + o_c[None, :])
            b_row = tl.load(p_row) if EVEN else tl.load(p_row, mask=(i_c + o_c < channels)[None, :], other=0.0)
            b_rows = b_rows + (b_row,)
        b_x = ()
        for i in tl.static_range(SOURCES):
            b_x = b_x + elements(to_float32(b_rows[i]), BLOCK_T, LANES, LOG2_VECTOR)
        b_more = ()
        for j in tl.static_range(NEAR):
            b_y = elements(to_float32(b_rows[SOURCES + j]), BLOCK_T, LANES, LOG2_VECTOR)
            for i in tl.static_range(SOURCES):
                b_sum = b_sums[j * SOURCES + i]
                for e in tl.static_range(VECTOR):
                    b_sum = tl.fma(b_x[i * VECTOR + e], b_y[e], b_sum)
                b_more = b_more + (b_sum,)
        for i in tl.static_range(2**LOG2_PLACES - SOURCES * NEAR):
            b_more = b_more + (b_sums[SOURCES * NEAR + i],)
        b_sums = b_more
    b_all = tl.reshape(side_by_side(b_sums, LOG2_PLACES), (BLOCK_T, LANES, 2**LOG2_PLACES))
    b_all = tl.reshape(tl.permute(b_all, (0, 2, 1)), (BLOCK_T * 2**LOG2_PLACES, LANES))
    return tl.reshape(tree_sum(b_all, LOG2_LANES), (BLOCK_T, 2**LOG2_PLACES))


@triton.jit
def _near(p_list, p_starts, b_y, b_x, o_j, i_n, last_y, last_x, cells, m_t, WINDOW: tl.constexpr, LISTED: tl.constexpr):
    """The word of the destination o_j of those near tile (b_y, b_x): a row of the window after the other."""
    SIDE: tl.constexpr = 2 * WINDOW + 1
    b_row, o_in = b_y + o_j // SIDE - WINDOW, o_j % SIDE
    if LISTED:
        # However many there are in a row of the window, from i_n on.
        m_row = m_t & (b_row >= 0) & (b_row <= last_y)
        p_row = p_starts + b_row * (last_x + 1)
        b_begin = tl.load(p_row + tl.maximum(b_x - WINDOW, 0), mask=m_row, other=0)
        b_end = tl.load(p_row + tl.minimum(b_x + WINDOW, last_x) + 1, mask=m_row, other=0)
        o_d = b_begin + i_n + o_in
        return tl.load(p_list + o_d, mask=o_d < b_end, other=NOTHING)
    # One a tile. Where there is no tile, that of the sources once more, which changes nothing.
    b_column = b_x + o_in - WINDOW
    m_tile = (b_row >= 0) & (b_row <= last_y) & (b_column >= 0) & (b_column <= last_x)
    o_d = tl.where(m_tile, b_row, b_y) * (last_x + 1) + tl.where(m_tile, b_column, b_x)
    return tl.load(p_list + o_d, mask=m_t, other=NOTHING)


@triton.jit
def tokens_before(b_y, b_x, height, width, last_y, last_x, SY: tl.constexpr, SX: tl.constexpr):
    """How many tokens come before tile (b_y, b_x), tile by tile, leftover strips with their nearest tile."""
    b_height = tl.where(b_y < last_y, SY, height - last_y * SY)
    return b_y * SY * width + b_x * SX * b_height


@triton.jit
def lower_bounds(p_list, b_value, count):
    """How many entries of an ascending list come before each value."""
    b_low = tl.zeros(b_value.shape, tl.int32)
    b_high = tl.zeros(b_value.shape, tl.int32) + count
    length = count
    while length > 0:
        m_open = b_low < b_high
        b_middle = (b_low + b_high) // 2
        m_below = tl.load(p_list + b_middle, mask=m_open, other=0) < b_value
        b_low = tl.where(m_open & m_below, b_middle + 1, b_low)
        b_high = tl.where(m_open & ~m_below, b_middle, b_high)
        length = length // 2
    return b_low


@triton.jit
def order_by_tile(
    p_list,
    p_starts,
    i_t,
    height,
    width,
    num_destinations,
    SY: tl.constexpr,
    SX: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Of tokens i_t * BLOCK_T and on: which are destinations, how many of these come before them when the tokens stand
    tile by tile, and how many sources. Writes where the destinations of each tile begin that begins here."""
    last_y, last_x = tl.maximum(height // SY - 1, 0), tl.maximum(width // SX - 1, 0)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    b_row, b_column = o_t // width, o_t % width
    b_y, b_x = tl.minimum(b_row // SY, last_y), tl.minimum(b_column // SX, last_x)
    # The destinations of the rows of tiles that the block is in.
    o_2 = tl.arange(0, 2)
    b_y_2 = tl.minimum((i_t * BLOCK_T + o_2 * (BLOCK_T - 1)) // width // SY, last_y) + o_2
    b_bound = lower_bounds(p_list, tl.where(b_y_2 > last_y, INT_MAX, b_y_2 * SY * width), num_destinations)
    begin, end = tl.min(b_bound, 0), tl.max(b_bound, 0)
    b_before, b_found = tl.zeros((BLOCK_T,), tl.int32) + begin, tl.zeros((BLOCK_T,), tl.int32)
    for i in range(begin, end, 64):
        o_d = i + tl.arange(0, 64)
        b_d = tl.load(p_list + o_d, mask=o_d < end, other=INT_MAX)[None, :]
        b_d_y, b_d_x = tl.minimum(b_d // width // SY, last_y), tl.minimum(b_d % width // SX, last_x)
        m_same_row = (o_d < end)[None, :] & (b_d_y == b_y[:, None])
        m_before = m_same_row & ((b_d_x < b_x[:, None]) | ((b_d_x == b_x[:, None]) & (b_d < o_t[:, None])))
        m_before = m_before | ((o_d < end)[None, :] & (b_d_y < b_y[:, None]))
        b_before += tl.sum(m_before.to(tl.int32), 1)
        b_found = tl.maximum(b_found, tl.max((b_d == o_t[:, None]).to(tl.int32), 1))
    b_width = tl.where(b_x < last_x, SX, width - last_x * SX)
    b_place = tokens_before(b_y, b_x, height, width, last_y, last_x, SY, SX)
    b_place += (b_row - b_y * SY) * b_width + b_column - b_x * SX
    m_t = o_t < height * width
    m_first = m_t & (b_row == b_y * SY) & (b_column == b_x * SX)
    tl.store(p_starts + b_y * (last_x + 1) + b_x, b_before, mask=m_first)
    tl.store(p_starts + (last_y + 1) * (last_x + 1) + o_t * 0, num_destinations + o_t * 0, mask=o_t == 0)
    return b_found > 0, b_before, b_place - b_before


@triton.jit
def _sources_of_tile(
    p_starts, o_t, height, width, last_y, last_x, num_sources, SY: tl.constexpr, SX: tl.constexpr, LISTED: tl.constexpr
):
    """Row and column of tiles o_t, and where their sources begin and end in the list."""
    cells = (last_y + 1) * (last_x + 1)
    b_y, b_x = o_t // (last_x + 1), o_t % (last_x + 1)
    if LISTED:
        m_t = o_t < cells
        o_next = o_t + 1
        b_before = tokens_before(b_y, b_x, height, width, last_y, last_x, SY, SX)
        b_after = tokens_before(o_next // (last_x + 1), o_next % (last_x + 1), height, width, last_y, last_x, SY, SX)
        b_after = tl.where(o_next == cells, height * width, b_after)
        b_begin = b_before - tl.load(p_starts + o_t, mask=m_t, other=0)
        b_end = b_after - tl.load(p_starts + o_next, mask=m_t, other=0)
        return b_y, b_x, tl.where(m_t, b_begin, 0), tl.where(m_t, b_end, 0)
    # Those of the tiles, then one by one those of the right strip and those of the bottom strip.
    OWN: tl.constexpr = SY * SX - 1
    strip = width - (last_x + 1) * SX
    o_strip = o_t - cells
    m_tile, m_right = o_strip < 0, o_strip < (last_y + 1) * SY * strip
    b_row = o_strip // tl.maximum(strip, 1) // SY
    b_column = tl.minimum((o_strip - (last_y + 1) * SY * strip) % width // SX, last_x)
    b_y = tl.where(m_tile, b_y, tl.where(m_right, b_row, last_y))
    b_x = tl.where(m_tile, b_x, tl.where(m_right, last_x, b_column))
    b_begin = tl.where(m_tile, o_t * OWN, cells * OWN + o_strip)
    return b_y, b_x, b_begin, tl.minimum(b_begin + tl.where(m_tile, OWN, 1), num_sources)


@triton.jit(do_not_specialize=["n", "num_destinations", "num_sources", "num_first", "height", "width", "s_xb"])
def match_near_kernel(
    p_x, p_inverse_norm, p_sources, p_words, p_starts, p_packed, n, units, num_destinations, num_sources, num_first,
    height, width, s_xb, s_xn, UNIT: tl.constexpr, FAR: tl.constexpr, EVEN: tl.constexpr, STEP: tl.constexpr,
    LOG2_LANES: tl.constexpr, LOG2_VECTOR: tl.constexpr, LOG2_PLACES: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    WINDOW: tl.constexpr, LISTED: tl.constexpr, SOURCES: tl.constexpr, BLOCK_T: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (block of BLOCK_T tiles, batch row), SOURCES sources of each at a time.

    Channels and strides count UNIT elements; FAR says that offsets within a row of the batch need 64 bits; EVEN that
    STEP divides the channels. With LISTED, p_starts says where the destinations of a tile begin and sources stand by
    tile; without, there is one destination a tile, and sources of leftover strips come last. The lowest destination is
    among the first num_first of the list.
    """
    wait_for_predecessor(EARLY)
    i_t, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    SIDE: tl.constexpr = 2 * WINDOW + 1
    NEAR: tl.constexpr = SIDE * SIDE
    channels = units * UNIT
    s_row = tl.cast(s_xn, tl.int64 if FAR else tl.int32) * UNIT
    last_y, last_x = tl.maximum(height // SY - 1, 0), tl.maximum(width // SX - 1, 0)
    cells = (last_y + 1) * (last_x + 1)
    p_tokens = p_x + i_b * s_xb * UNIT
    p_norms = p_inverse_norm + i_b * n
    p_list = p_words + i_b * num_destinations
    p_own = p_sources + i_b * num_sources
    p_tiles = p_starts + i_b * (cells + 1)

    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    b_y, b_x, b_begin, b_end = _sources_of_tile(
        p_tiles, o_t, height, width, last_y, last_x, num_sources, SY, SX, LISTED
    )
    o_v = tl.arange(0, 2**LOG2_PLACES)
    o_place, o_source = (o_v // SOURCES)[None, :], (o_v % SOURCES)[None, :]
    most_near = SIDE
    if LISTED:
        most_near = 0
        for i in tl.static_range(SIDE):
            b_row = b_y + i - WINDOW
            m_row = (b_begin < b_end) & (b_row >= 0) & (b_row <= last_y)
            p_row = p_tiles + b_row * (last_x + 1)
            b_count = tl.load(p_row + tl.minimum(b_x + WINDOW, last_x) + 1, mask=m_row, other=0)
            b_count -= tl.load(p_row + tl.maximum(b_x - WINDOW, 0), mask=m_row, other=0)
            most_near = tl.maximum(most_near, tl.max(b_count, 0))
    # Of leftover strips, one at a time.
    most = tl.max(b_end - b_begin, 0) if LISTED else tl.where(i_t * BLOCK_T < cells, tl.maximum(SY * SX - 1, 1), 1)
    for i_s in range(0, most, SOURCES):
        b_tokens, m_own, o_sources, b_best = (), (), (), ()
        for i in tl.static_range(SOURCES):
            m_s = b_begin + i_s + i < b_end
            b_token = tl.load(p_own + b_begin + i_s + i, mask=m_s, other=0)
            b_tokens, m_own, o_sources = b_tokens + (b_token,), m_own + (m_s,), o_sources + (b_token * s_row,)
            b_best = b_best + (tl.full((BLOCK_T,), _LEAST, tl.int64),)
        o_s = b_begin[:, None] + i_s + o_source
        m_s = (o_s < b_end[:, None]) & (o_place < NEAR)
        b_inverse = tl.load(p_norms + tl.load(p_own + o_s, mask=m_s, other=0), mask=m_s, other=0.0)
        for i_n in range(0, most_near, SIDE):
            o_near = ()
            for j in tl.static_range(NEAR):
                b_word = _near(
                    p_list, p_tiles, b_y, b_x, j, i_n, last_y, last_x, cells, b_begin < b_end, WINDOW, LISTED
                )
                o_near = o_near + (destination_token(b_word) * s_row,)
            b_word = _near(
                p_list, p_tiles, b_y[:, None], b_x[:, None], o_place, i_n, last_y, last_x, cells, m_s, WINDOW, LISTED
            )
            b_dots = _dots(
                *(p_tokens, o_sources, o_near, channels),
                *(EVEN, STEP, LOG2_LANES, LOG2_VECTOR, LOG2_PLACES, SOURCES, NEAR, BLOCK_T),
            )
            # NaN for what cannot be matched, and for what it is matched with.
            b_cosine = b_dots * destination_scale(b_word) * b_inverse
            m_match = (b_inverse > 0.0) & (b_cosine > float("-inf"))
            b_key = pack(ordered_key(tl.where(m_match, b_cosine, 0.0)), destination_token(b_word))
            b_key = tl.where(m_match, b_key, _LEAST)
            b_new = ()
            for i in tl.static_range(SOURCES):
                b_high = tl.max(tl.where(o_source == i, b_key, _LEAST), axis=1)
                b_new = b_new + (tl.maximum(b_best[i], b_high),)
            b_best = b_new
        b_unmatched = tl.zeros((BLOCK_T,), tl.int32)
        for i in tl.static_range(SOURCES):
            b_unmatched += (m_own[i] & (b_best[i] == _LEAST)).to(tl.int32)
        lowest = num_first * 0
        if tl.max(b_unmatched, 0) > 0:
            # Sources that no destination matches go to the first one.
            o_j = tl.arange(0, 64)
            b_first = tl.full((64,), INT_MAX, tl.int32)
            for i_n in range(0, num_first, 64):
                b_word = tl.load(p_list + i_n + o_j, mask=i_n + o_j < num_first, other=INT_MAX)
                b_first = tl.minimum(b_first, destination_token(b_word))
            lowest = tl.min(b_first, 0)
        b_none = pack(ordered_key(tl.full((BLOCK_T,), float("-inf"), tl.float32)), lowest)
        for i in tl.static_range(SOURCES):
            b_packed = tl.where(b_best[i] == _LEAST, b_none, b_best[i])
            tl.store(p_packed + i_b * n + b_tokens[i], b_packed, mask=m_own[i])


def tiles_of(grid: tuple[int, int], stride: tuple[int, int]) -> int:
    """How many tiles there are for tokens to belong to; one where the grid is smaller than a tile."""
    return max(grid[0] // stride[0], 1) * max(grid[1] // stride[1], 1)


def is_near(window: int | None, grid: tuple[int, int], stride: tuple[int, int], num_destinations: int) -> bool:
    """Whether a match is that of this file: a window of one tile at most, and one destination a tile on the average.

    It follows from the numbers of a call alone, as the tensor cores sum in another order.
    """
    return window is not None and window <= WIDEST and num_destinations <= tiles_of(grid, stride)


def launch_match_near(
    x: Tensor,
    inverse_norm: Tensor,
    sources: Tensor,
    words: Tensor,
    starts: Tensor | None,
    num_first: int,
    grid: tuple[int, int],
    stride: tuple[int, int],
    window: int,
    packed: Tensor,
    config: configs.Config | None = None,
) -> None:
    """The matching launch alone; x (P, N, C), inverse_norm (P, N), sources (P, S), words (P, D), packed (P, N), starts
    (P, tiles + 1) or None of the lists that L-GTM makes."""
    rows, n, channels = x.shape
    (height, width), (sy, sx) = grid, stride
    step, vector = step_of(channels, _WIDEST_STEP), 16 // x.element_size()
    tiles = tiles_of(grid, stride)
    config = config or configs.pick("match_near", x.device, max(1, rows // 16) * x[0].numel() * x.element_size())
    block = max(config["VECTORS"] * vector // step, 1)
    strips = 0 if starts is not None else n - tiles * sy * sx
    unit = unit_of(channels, x.stride(0) if rows > 1 else 0, x.stride(1))
    near = (2 * window + 1) ** 2
    programs(match_near_kernel, cdiv(tiles + strips, block), rows)(
        p_x=x,
        p_inverse_norm=inverse_norm,
        p_sources=sources,
        p_words=words,
        p_starts=words if starts is None else starts,
        p_packed=packed,
        n=n,
        units=channels // unit,
        num_destinations=words.shape[1],
        num_sources=sources.shape[1],
        num_first=num_first,
        height=height,
        width=width,
        s_xb=x.stride(0) // unit if rows > 1 else 0,
        s_xn=x.stride(1) // unit,
        UNIT=unit,
        FAR=n * x.stride(1) >= 2**31,
        EVEN=channels % step == 0,
        STEP=step,
        LOG2_LANES=(step // vector).bit_length() - 1,
        LOG2_VECTOR=vector.bit_length() - 1,
        LOG2_PLACES=power_of_2(SOURCES * near).bit_length() - 1,
        SY=sy,
        SX=sx,
        WINDOW=window,
        LISTED=starts is not None,
        SOURCES=SOURCES,
        BLOCK_T=block,
        **{name: value for name, value in config.items() if name != "VECTORS"},
        **EXACT,
        **early(x.device),
    )
