"""Best destination of every source by cosine similarity, without the similarity matrix (Bolya et al. 2023).

A program multiplies tiles of sources with tiles of destinations on the tensor cores, scales by the inverse norms, and
keeps a running (similarity, lowest index) maximum of each source. All tiles of a launch stand in one row, of which
every program takes as many: no multiprocessor has more than one tile above the mean. Programs that share sources
combine through a 64-bit atomic maximum, which is the same in any order. How many they are is the grid of the launch and
no constant of the kernel: one binary serves every batch.

Sources of few channels stay in shared memory while the destinations pass (KEEP); wider ones are read again for each
tile. A destination and its inverse norm are one 64-bit word, in the order of the list: what a tile needs of its
destinations is one load, with no other before it.

The step over channels holds the loads and the product alone. Row addresses, masks and scales are made once a tile, and
channels are masked only when BLOCK_K does not divide them.

Tensor cores align products to the largest, drop what lies two bits below float32, and round towards zero: each step
loses up to that much, always downwards for similar tokens, in proportion to the sum so far. With 16-bit inputs the
products of PART channels are therefore summed there, and the sums of parts outside, in float32 that rounds to nearest;
tests/tensor_core.py models the error. float32 goes through tf32x3, which adds up outside of the tensor cores anyway.

The same bits under every config: the channels are always summed in steps of BLOCK_K, in order, in the same parts, so
that BLOCK_M, BLOCK_N, the split and the number of warps decide only which program computes a similarity. On tensor
cores this holds among configs that use one kind of instruction; the shipped ones all have BLOCK_M >= 64 and at least 4
warps.

float32 input uses three TF32 products per product ("tf32x3"): plain TF32 is off by 3e-4 and would change matches, and
"ieee" does not use the tensor cores. What tf32x3 drops is below 2^-21 of a product, the size of float32 rounding. AMD
GPUs multiply float32 natively, and take "ieee".
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from ._common import (
    CHANNELS,
    EXACT,
    INT_MAX,
    INT_MIN,
    LOG2_CHANNELS,
    destination_scale,
    destination_token,
    destination_word,
    inverse_norm,
    key_to_float,
    ordered_key,
    pack,
    tree_sum,
    unit_last_stride,
    unpack_index,
    unpack_key,
)
from .early import early, wait_for_predecessor
from .launching import cdiv, programs

# 128 bytes of a row: the width of a shared-memory swizzle atom.
BLOCK_K = {torch.float16: 64, torch.bfloat16: 64, torch.float32: 32}
# Channels whose products are summed inside the tensor cores; up to LONGEST_PART, all of them.
PART = 256
LONGEST_PART = 320
# Elements in 16 bytes of a 16-bit row. Strides and channels that it divides reach the kernel in this unit, so that the
# compiler sees the alignment: by itself Triton notices multiples of 16 only.
UNIT = 8
# What a similarity counts in the measure of configs.pick: a match is "large" from 2^18 similarities on.
_WORK = configs.LARGE >> 18
_INTEGERS = [
    *("n", "num_destinations", "num_sources", "num_first", "rows", "products"),
    *("height", "width", "window", "s_xb"),
]


# The word of no destination: its scale is NaN.
_NOTHING = tl.constexpr(0x7FC00000 << 32)
# What of a config the launcher reads and the kernel does not.
_HOST = ("SPLIT", "RESIDENT", "KEEP")


@triton.jit
def _lower_bound(p_list, count, value):
    """How many entries of a list come before `value`; entries below it all stand before those that are not."""
    low, high = count * 0, count
    while low < high:
        middle = (low + high) // 2
        if destination_token(tl.load(p_list + middle)) < value:
            low = middle + 1
        else:
            high = middle
    return low


@triton.jit(do_not_specialize=["n", "num_destinations", "s_xb", "s_db"])
def match_prepare_kernel(
    p_x,
    p_destinations,
    p_inverse_norm,
    p_sources,
    p_words,
    p_packed,
    n,
    units,
    num_destinations,
    s_xb,
    s_xn,
    s_db,
    UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Inverse norms, the list of sources, and the results at destinations, when no score pass has made them."""
    wait_for_predecessor(EARLY)
    i_t, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_c = tl.arange(0, CHANNELS)
    m_t = o_t < n
    channels = units * UNIT
    p_rows = p_x + i_b * s_xb * UNIT + o_t.to(tl.int64)[:, None] * (tl.cast(s_xn, tl.int64) * UNIT) + o_c[None, :]
    b_squares = tl.zeros((BLOCK_T, CHANNELS), tl.float32)
    for i_c in range(0, channels, CHANNELS):
        b_x = tl.load(p_rows + i_c, mask=m_t[:, None] & (i_c + o_c < channels)[None, :], other=0.0).to(tl.float32)
        b_squares = tl.fma(b_x, b_x, b_squares)
    o_out = i_b * n + o_t
    b_inverse_norm = inverse_norm(tree_sum(b_squares, LOG2_CHANNELS))
    tl.store(p_inverse_norm + o_out, b_inverse_norm, mask=m_t)

    # Binary search of every token in the ascending list: how many destinations come before it.
    p_list = p_destinations + i_b * s_db
    b_low = tl.zeros((BLOCK_T,), tl.int32)
    b_high = tl.zeros((BLOCK_T,), tl.int32) + num_destinations
    length = num_destinations
    while length > 0:
        m_open = b_low < b_high
        b_middle = (b_low + b_high) // 2
        m_below = tl.load(p_list + b_middle, mask=m_open, other=0) < o_t
        b_low = tl.where(m_open & m_below, b_middle + 1, b_low)
        b_high = tl.where(m_open & ~m_below, b_middle, b_high)
        length = length // 2
    m_found = b_low < num_destinations
    m_destination = m_found & (tl.load(p_list + b_low, mask=m_found, other=-1) == o_t)
    # Without destinations every token is its own match.
    m_done = m_destination | (b_low + num_destinations == 0)
    tl.store(p_sources + i_b * (n - num_destinations) + o_t - b_low, o_t, mask=m_t & ~m_destination)
    b_word = destination_word(o_t, b_inverse_norm)
    tl.store(p_words + i_b * num_destinations + b_low, b_word, mask=m_t & m_destination)
    b_key = tl.where(m_done, ordered_key(tl.full((BLOCK_T,), float("-inf"), tl.float32)), INT_MIN)
    tl.store(p_packed + o_out, pack(b_key, o_t), mask=m_t)


@triton.jit
def _load_tile(p_rows, m_rows, i_k, o_k, channels, EVEN: tl.constexpr):
    """Channels i_k + o_k of a tile (rows, BLOCK_K) of tokens; zeros where there are none."""
    if EVEN:
        return tl.load(p_rows + i_k, mask=m_rows[:, None], other=0.0)
    return tl.load(p_rows + i_k, mask=m_rows[:, None] & (i_k + o_k < channels)[None, :], other=0.0)


@triton.jit
def _load_words(p_list, i_n, o_j, limit, FULL: tl.constexpr):
    """The words from i_n on. When there are as many as o_j asks for (FULL), the last ones, rather than too few: to come
    upon a destination twice changes nothing, and a mask would cost instructions."""
    if FULL:
        return tl.load(p_list + tl.minimum(i_n, limit - o_j.shape[0]) + o_j)
    return tl.load(p_list + i_n + o_j, mask=i_n + o_j < limit, other=_NOTHING)


@triton.jit
def _best_kept(
    p_tokens,
    p_list,
    p_a,
    m_a,
    b_row_scale,
    begin,
    end,
    num_destinations,
    channels,
    s_row,
    LONG: tl.constexpr,
    STEPS: tl.constexpr,
    EVEN: tl.constexpr,
    FULL: tl.constexpr,
    ORDERED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LONG_K: tl.constexpr,
):
    """The best destinations begin to end, for sources that stay in shared memory: LONG parts of LONG_K channels and
    STEPS steps of BLOCK_K. Every thread keeps the best of its own places in the tile; they are compared when
    all have passed."""
    o_long, o_k, o_j = tl.arange(0, LONG_K), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_N)
    # Triton does not unpack tuples into others.
    long, short = (), ()
    for i in tl.static_range(LONG):
        b_a = _load_tile(p_a + o_long[None, :], m_a, i * LONG_K, o_long, channels, True)
        long = long + (b_a,)  # type: ignore[assignment] # noqa: RUF005
    for i in tl.static_range(STEPS):
        b_a = _load_tile(p_a + o_k[None, :], m_a, LONG * LONG_K + i * BLOCK_K, o_k, channels, EVEN)
        short = short + (b_a,)  # type: ignore[assignment] # noqa: RUF005
    b_best = tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float32)
    b_best_token = tl.full((BLOCK_M, BLOCK_N), INT_MAX, tl.int32)
    b_next = _load_words(p_list, begin, o_j, num_destinations, FULL)
    for i_n in range(begin, end, BLOCK_N):
        # The rows to copy are known a step before. The words are loaded once more for the similarities, as they would
        # else stay in registers, in another layout, for as long as copies are ahead.
        b_word, b_ahead = _load_words(p_list, i_n, o_j, num_destinations, FULL), b_next
        b_next = _load_words(p_list, tl.minimum(i_n + BLOCK_N, end - 1), o_j, num_destinations, FULL)
        m_b = destination_scale(b_ahead) > 0.0
        p_b = p_tokens + destination_token(b_ahead).to(tl.int64)[:, None] * s_row
        b_dot = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i in tl.static_range(LONG):
            b_b = _load_tile(p_b + o_long[None, :], m_b, i * LONG_K, o_long, channels, True)
            b_dot = tl.dot(long[i], tl.trans(b_b), b_dot)
        for i in tl.static_range(STEPS):
            b_b = _load_tile(p_b + o_k[None, :], m_b, LONG * LONG_K + i * BLOCK_K, o_k, channels, EVEN)
            b_dot = tl.dot(short[i], tl.trans(b_b), b_dot)
        # NaN for what cannot be matched: not better than anything.
        b_cosine = b_dot * destination_scale(b_word)[None, :] * b_row_scale[:, None]
        b_token = tl.broadcast_to(destination_token(b_word)[None, :], (BLOCK_M, BLOCK_N))
        m_better = b_cosine > b_best
        if not ORDERED:
            m_better |= (b_cosine == b_best) & (b_token < b_best_token)
        b_best_token = tl.where(m_better, b_token, b_best_token)
        b_best = tl.where(m_better, b_cosine, b_best)
    b_high = tl.max(b_best, axis=1)
    return b_high, tl.min(tl.where(b_best == b_high[:, None], b_best_token, INT_MAX), axis=1)


@triton.jit
def _dot(
    p_a,
    p_b,
    m_a,
    m_b,
    channels,
    EVEN: tl.constexpr,
    PART: tl.constexpr,
    NEST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Products of rows p_a and p_b (the addresses of their first BLOCK_K channels), (BLOCK_M, BLOCK_N)."""
    o_k = tl.arange(0, BLOCK_K)
    b_dot = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Adding a part after its last product would let the compiler make one accumulator of the two.
    if PART and NEST:
        for i_part in range(0, channels, PART):
            b_part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for i_k in range(i_part, tl.minimum(i_part + PART, channels), BLOCK_K):
                b_a = _load_tile(p_a, m_a, i_k, o_k, channels, EVEN)
                b_b = _load_tile(p_b, m_b, i_k, o_k, channels, EVEN)
                b_part = tl.dot(b_a, tl.trans(b_b), b_part, input_precision=PRECISION)
            b_dot += b_part
        return b_dot
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i_k in range(0, channels, BLOCK_K):
        b_a = _load_tile(p_a, m_a, i_k, o_k, channels, EVEN)
        b_b = _load_tile(p_b, m_b, i_k, o_k, channels, EVEN)
        if PART:
            if i_k % PART == 0:
                b_sum += b_dot
                b_dot = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        b_dot = tl.dot(b_a, tl.trans(b_b), b_dot, input_precision=PRECISION)
    if PART:
        b_dot += b_sum
    return b_dot


@triton.jit(do_not_specialize=_INTEGERS)
def bipartite_match_kernel(
    p_x,
    p_inverse_norm,
    p_sources,
    p_words,
    p_packed,
    n,
    units,
    num_destinations,
    num_sources,
    num_first,
    rows,
    products,
    height,
    width,
    window,
    s_xb,
    s_xn,
    UNIT: tl.constexpr,
    EVEN: tl.constexpr,
    PART: tl.constexpr,
    NEST: tl.constexpr,
    LONG: tl.constexpr,
    STEPS: tl.constexpr,
    FULL: tl.constexpr,
    ORDERED: tl.constexpr,
    WINDOW: tl.constexpr,
    SY: tl.constexpr,
    SX: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LONG_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A program makes `products` tiles (BLOCK_M sources, BLOCK_N destinations) in a row, destinations first, then
    sources, then batch rows. The lowest destination is among the first num_first of the list. With WINDOW, the
    destinations of each row of tiles stand together, rows ascending, and a program has whole tiles of sources. Strides
    of x and its channels count UNIT elements; EVEN says that BLOCK_K divides the channels; PART is 0 when they are one
    part; NEST takes a loop for each part, where the compiler cannot put an accumulator aside within a loop over all.
    LONG and STEPS are the channels of sources that are kept, both 0 when they are read again for each tile. FULL: there
    are BLOCK_N destinations; ORDERED: what lies BLOCK_N apart in the list, or where the last tile laps over the one
    before, is ascending."""
    wait_for_predecessor(EARLY)
    channels = units * UNIT
    s_row = tl.cast(s_xn, tl.int64) * UNIT
    o_k, o_j = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_N)
    tiles_m, tiles_n = tl.cdiv(num_sources, BLOCK_M), tl.cdiv(num_destinations, BLOCK_N)
    first = tl.program_id(0) * products
    last = tl.minimum(first + products, rows * tiles_m * tiles_n)
    for i_tile in range(first // tiles_n, tl.cdiv(last, tiles_n)):
        i_b = (i_tile // tiles_m).to(tl.int64)
        begin = tl.maximum(first - i_tile * tiles_n, 0) * BLOCK_N
        end = tl.minimum(tl.minimum(last - i_tile * tiles_n, tiles_n) * BLOCK_N, num_destinations)
        p_tokens = p_x + i_b * s_xb * UNIT
        p_list = p_words + i_b * num_destinations
        o_m = i_tile % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
        m_m = o_m < num_sources
        b_source = tl.load(p_sources + i_b * num_sources + o_m, mask=m_m, other=0)
        b_inverse = tl.load(p_inverse_norm + i_b * n + b_source, mask=m_m, other=0.0)
        # Rows without a direction are read as zeros: no NaN enters the products.
        m_a = b_inverse > 0.0
        b_row_scale = tl.where(m_a, b_inverse, 1.0)
        p_a = p_tokens + b_source.to(tl.int64)[:, None] * s_row

        lowest = INT_MAX
        for i_n in range(0, num_first, BLOCK_N):
            b_first = destination_token(tl.load(p_list + i_n + o_j, mask=i_n + o_j < num_first, other=INT_MAX))
            lowest = tl.minimum(lowest, tl.min(b_first, 0))

        if LONG + STEPS > 0:
            b_best, b_best_token = _best_kept(
                *(p_tokens, p_list, p_a, m_a, b_row_scale, begin, end, num_destinations, channels, s_row),
                *(LONG, STEPS, EVEN, FULL, ORDERED, BLOCK_M, BLOCK_N, BLOCK_K, LONG_K),
            )
        else:
            if WINDOW:
                last_y, last_x = tl.maximum(height // SY - 1, 0), tl.maximum(width // SX - 1, 0)
                b_tile_y = tl.minimum(b_source // width // SY, last_y)
                b_tile_x = tl.minimum(b_source % width // SX, last_x)
                top = tl.min(tl.where(m_m, b_tile_y, INT_MAX), 0) - window
                bottom = tl.max(tl.where(m_m, b_tile_y, -1), 0) + window
                begin = _lower_bound(p_list, num_destinations, top * SY * width)
                if bottom < last_y:
                    end = _lower_bound(p_list, num_destinations, (bottom + 1) * SY * width)
            b_best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            b_best_token = tl.full((BLOCK_M,), INT_MAX, tl.int32)
            limit = end if WINDOW else num_destinations
            b_next = _load_words(p_list, begin, o_j, limit, FULL)
            for i_n in range(begin, end, BLOCK_N):
                m_b = destination_scale(b_next) > 0.0
                p_b = p_tokens + destination_token(b_next).to(tl.int64)[:, None] * s_row + o_k[None, :]
                b_dot = _dot(
                    *(p_a + o_k[None, :], p_b, m_a, m_b, channels),
                    *(EVEN, PART, NEST, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K),
                )
                b_next = _load_words(p_list, tl.minimum(i_n + BLOCK_N, end - 1), o_j, limit, FULL)
                b_word = _load_words(p_list, i_n, o_j, limit, FULL)
                b_destination, b_scale = destination_token(b_word), destination_scale(b_word)
                # -inf for what cannot be matched; adding zero also makes -0 and 0 one similarity. The row's own scale
                # is applied before comparing: it can round two values to one, and programs compare what is rounded.
                m_n = b_scale > 0.0
                b_scale, b_bias = tl.where(m_n, b_scale, 0.0), tl.where(m_n, 0.0, float("-inf"))
                b_cosine = tl.fma(b_dot * b_scale[None, :], b_row_scale[:, None], b_bias[None, :])
                if WINDOW:
                    b_away_y = tl.abs(b_tile_y[:, None] - tl.minimum(b_destination // width // SY, last_y)[None, :])
                    b_away_x = tl.abs(b_tile_x[:, None] - tl.minimum(b_destination % width // SX, last_x)[None, :])
                    b_cosine = tl.where(tl.maximum(b_away_y, b_away_x) <= window, b_cosine, float("-inf"))
                b_high = tl.max(b_cosine, axis=1)
                b_high_token = tl.min(tl.where(b_cosine == b_high[:, None], b_destination[None, :], INT_MAX), axis=1)
                m_better = (b_high > b_best) | ((b_high == b_best) & (b_high_token < b_best_token))
                b_best_token = tl.where(m_better, b_high_token, b_best_token)
                b_best = tl.where(m_better, b_high, b_best)

        m_matched = m_a & (b_best > float("-inf"))
        b_similarity = tl.where(m_matched, b_best, float("-inf"))
        b_match = tl.where(m_matched, b_best_token, lowest)
        p_out = p_packed + i_b * n + b_source
        tl.atomic_max(p_out, pack(ordered_key(b_similarity), b_match), mask=m_m, sem="relaxed")


@triton.jit(do_not_specialize=["count"])
def match_unpack_kernel(p_packed, p_similarity, p_match, count, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    wait_for_predecessor(EARLY)
    o_t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_t = o_t < count
    b_packed = tl.load(p_packed + o_t, mask=m_t, other=0)
    tl.store(p_similarity + o_t, key_to_float(unpack_key(b_packed)), mask=m_t)
    tl.store(p_match + o_t, unpack_index(b_packed), mask=m_t)


def _products(
    x: Tensor, num_sources: int, num_destinations: int, window: int | None, config: configs.Config
) -> tuple[int, int]:
    """(tiles that each program makes, programs): as many for each, and on no multiprocessor more than must be."""
    tiles_n = cdiv(num_destinations, config["BLOCK_N"])
    tiles = x.shape[0] * cdiv(num_sources, config["BLOCK_M"]) * tiles_n
    if window is not None:
        # A window has few destinations: a program goes through them for a whole tile of sources.
        return tiles_n, tiles // tiles_n
    if "SPLIT" in config:
        each = cdiv(tiles_n, config["SPLIT"])
    else:
        at_once = configs.multiprocessors(x.device) * config.get("RESIDENT", 1)
        each = cdiv(tiles, at_once)
    return each, cdiv(tiles, each)


def layout_arguments(x: Tensor) -> dict[str, Any]:
    """Strides and channels of x (P, N, C) in units that keep 16-byte accesses, and what follows from the channels."""
    rows, _, channels = x.shape
    s_xb, s_xn = x.stride(0) if rows > 1 else 0, x.stride(1)
    unit = UNIT if s_xb % UNIT == s_xn % UNIT == channels % UNIT == 0 else 1
    return {"units": channels // unit, "s_xb": s_xb // unit, "s_xn": s_xn // unit, "UNIT": unit}


def launch_match(
    x: Tensor,
    inverse_norm: Tensor,
    sources: Tensor,
    words: Tensor,
    num_first: int,
    grid: tuple[int, int] | None,
    stride: tuple[int, int] | None,
    window: int | None,
    packed: Tensor,
    config: configs.Config | None = None,
) -> None:
    """The matching launch alone; x (P, N, C), inverse_norm (P, N), sources (P, S), words (P, D), packed (P, N)."""
    rows, n, channels = x.shape
    num_sources, num_destinations = sources.shape[1], words.shape[1]
    config = config or pick_match(x, num_sources, num_destinations, window)
    products, count = _products(x, num_sources, num_destinations, window, config)
    # Read only with a window: without one, a binary for each stride would be the same.
    (height, width), (sy, sx) = (grid, stride) if window is not None and grid and stride else ((1, n), (1, 1))
    block_n, block_k = config["BLOCK_N"], BLOCK_K[x.dtype]
    keep = config.get("KEEP", False) and window is None and channels <= LONGEST_PART
    long = channels // PART if keep else 0
    constants = {key: value for key, value in config.items() if key not in _HOST}
    programs(bipartite_match_kernel, count)(
        p_x=x,
        p_inverse_norm=inverse_norm,
        p_sources=sources,
        p_words=words,
        p_packed=packed,
        n=n,
        num_destinations=num_destinations,
        num_sources=num_sources,
        num_first=num_first,
        rows=rows,
        products=products,
        height=height,
        width=width,
        window=window or 0,
        **layout_arguments(x),
        EVEN=channels % block_k == 0,
        PART=PART if x.dtype != torch.float32 and channels > LONGEST_PART else 0,
        LONG=long,
        STEPS=cdiv(channels - long * PART, block_k) if keep else 0,
        FULL=window is None and num_destinations >= block_n,
        ORDERED=not keep or num_first <= (num_destinations % block_n or block_n),
        WINDOW=window is not None,
        SY=sy,
        SX=sx,
        PRECISION="tf32x3" if x.dtype == torch.float32 and not torch.version.hip else "ieee",
        BLOCK_K=block_k,
        LONG_K=PART,
        **{"NEST": False, **constants},
        **EXACT,
        **early(x.device),
    )


def config_op(dtype: torch.dtype, channels: int, window: int | None) -> str:
    """Whose configs such a match takes: float32 tiles take twice the bytes, a window takes registers, and few channels
    leave room for sources that stay."""
    if dtype == torch.float32:
        return "bipartite_match_fp32"
    if window is not None:
        return "bipartite_match_window"
    return "bipartite_match_narrow" if channels <= LONGEST_PART else "bipartite_match"


def pick_match(x: Tensor, num_sources: int, num_destinations: int, window: int | None) -> configs.Config:
    """The config for a match of this size. Up to 16 rows count as one, so that all such batches run the same binary."""
    op = config_op(x.dtype, x.shape[2], window)
    return configs.pick(op, x.device, max(1, x.shape[0] // 16) * num_sources * num_destinations * _WORK)


def launch_bipartite_match(
    x: Tensor,
    destinations: Tensor,
    window: int | None = None,
    grid: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
    config: configs.Config | None = None,
) -> tuple[Tensor, Tensor]:
    """similarity (B, N) float32 and match (B, N) int32 of x (B, N, C) over destinations (B, D) int32, ascending.

    Three launches: norms and lists, matching, and unpacking of what programs that share sources agreed on.
    """
    x, destinations = unit_last_stride(x), unit_last_stride(destinations)
    rows, n, _ = x.shape
    d = destinations.shape[1]
    similarity = torch.empty((rows, n), dtype=torch.float32, device=x.device)
    match = torch.empty((rows, n), dtype=torch.int32, device=x.device)
    if rows * n == 0:
        return similarity, match
    inverse_norm = torch.empty_like(similarity)
    sources = torch.empty((rows, n - d), dtype=torch.int32, device=x.device)
    words = torch.empty((rows, d), dtype=torch.int64, device=x.device)
    packed = torch.empty((rows, n), dtype=torch.int64, device=x.device)
    prepare = configs.pick("match_prepare", x.device, max(1, rows // 16) * x[0].numel() * x.element_size())
    programs(match_prepare_kernel, cdiv(n, prepare["BLOCK_T"]), rows)(
        p_x=x,
        p_destinations=destinations,
        p_inverse_norm=inverse_norm,
        p_sources=sources,
        p_words=words,
        p_packed=packed,
        n=n,
        num_destinations=d,
        s_db=destinations.stride(0),
        **layout_arguments(x),
        **prepare,
        **EXACT,
        **early(x.device),
    )
    if 0 < d < n:
        launch_match(x, inverse_norm, sources, words, 1, grid, stride, window, packed, config)
    programs(match_unpack_kernel, cdiv(rows * n, 1024))(
        p_packed=packed,
        p_similarity=similarity,
        p_match=match,
        count=rows * n,
        BLOCK=1024,
        num_warps=4,
        **EXACT,
        **early(x.device),
    )
    return similarity, match
