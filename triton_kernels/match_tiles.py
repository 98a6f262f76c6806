"""What a program of bipartite_match does with a tile of sources: products with tiles of destinations, and the best of
them."""

# Triton does not unpack tuples into others.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from ._common import INT_MAX, destination_scale, destination_token

# The word of no destination: its scale is NaN.
NOTHING = tl.constexpr(0x7FC00000 << 32)


@triton.jit
def load_tile(p_tokens, o_rows, i_k, o_k, channels, EVEN: tl.constexpr):
    """Channels i_k + o_k of a tile (rows, BLOCK_K) of tokens that begin at o_rows; zeros where there are none."""
    p_tile = p_tokens + i_k + (o_rows[:, None] + o_k[None, :])
    return tl.load(p_tile) if EVEN else tl.load(p_tile, mask=(i_k + o_k < channels)[None, :], other=0.0)


@triton.jit
def load_words(p_list, i_n, o_j, limit, FULL: tl.constexpr):
    """The words from i_n on. When there are as many as o_j asks for (FULL), the last ones, rather than too few: to come
    upon a destination twice changes nothing, and a mask would cost instructions."""
    if FULL:
        return tl.load(p_list + tl.minimum(i_n, limit - o_j.shape[0]) + o_j)
    return tl.load(p_list + i_n + o_j, mask=i_n + o_j < limit, other=NOTHING)


@triton.jit
def best_kept(
    p_tokens,
    p_list,
    o_a,
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
    long, short = (), ()
    for i in tl.static_range(LONG):
        b_a = load_tile(p_tokens, o_a, i * LONG_K, o_long, channels, True)
        long = long + (b_a,)
    for i in tl.static_range(STEPS):
        b_a = load_tile(p_tokens, o_a, LONG * LONG_K + i * BLOCK_K, o_k, channels, EVEN)
        short = short + (b_a,)
    b_best = tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float32)
    b_best_token = tl.full((BLOCK_M, BLOCK_N), INT_MAX, tl.int32)
    b_next = load_words(p_list, begin, o_j, num_destinations, FULL)
    for i_n in range(begin, end, BLOCK_N):
        # The rows to copy are known a step before. The words are loaded once more for the similarities, as they would
        # else stay in registers, in another layout, for as long as copies are ahead.
        b_word, b_ahead = load_words(p_list, i_n, o_j, num_destinations, FULL), b_next
        b_next = load_words(p_list, tl.minimum(i_n + BLOCK_N, end - 1), o_j, num_destinations, FULL)
        o_b = destination_token(b_ahead) * s_row
        b_dot = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i in tl.static_range(LONG):
            b_b = load_tile(p_tokens, o_b, i * LONG_K, o_long, channels, True)
            b_dot = tl.dot(long[i], tl.trans(b_b), b_dot)
        for i in tl.static_range(STEPS):
            b_b = load_tile(p_tokens, o_b, LONG * LONG_K + i * BLOCK_K, o_k, channels, EVEN)
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
def _dots(
    p_tokens,
    o_a,
    o_b,
    channels,
    EVEN: tl.constexpr,
    PART: tl.constexpr,
    NEST: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Products of the rows that begin at o_a, a tuple of GROUPS, with those that begin at o_b: (BLOCK_M, BLOCK_N), half
    as many rows, and so on."""
    o_k = tl.arange(0, BLOCK_K)
    b_zeros, b_dots = (), ()
    for i in tl.static_range(GROUPS):
        b_zeros = b_zeros + (tl.zeros((BLOCK_M >> i, BLOCK_N), tl.float32),)
    b_dots = b_zeros
    # Adding a part after its last product would let the compiler make one accumulator of the two.
    if PART and NEST:
        for i_part in range(0, channels, PART):
            b_parts = b_zeros
            for i_k in range(i_part, tl.minimum(i_part + PART, channels), BLOCK_K):
                b_b = tl.trans(load_tile(p_tokens, o_b, i_k, o_k, channels, EVEN))
                b_more = ()
                for i in tl.static_range(GROUPS):
                    b_a = load_tile(p_tokens, o_a[i], i_k, o_k, channels, EVEN)
                    b_more = b_more + (tl.dot(b_a, b_b, b_parts[i], input_precision=PRECISION),)
                b_parts = b_more
            b_dots = _add(b_dots, b_parts, GROUPS)
        return b_dots
    b_sums = b_dots
    for i_k in range(0, channels, BLOCK_K):
        b_a, b_more = (), ()
        for i in tl.static_range(GROUPS):
            b_a = b_a + (load_tile(p_tokens, o_a[i], i_k, o_k, channels, EVEN),)
        b_b = load_tile(p_tokens, o_b, i_k, o_k, channels, EVEN)
        if PART:
            if i_k % PART == 0:
                b_totals = ()
                for i in tl.static_range(GROUPS):
                    b_totals = b_totals + (b_sums[i] + b_dots[i],)
                b_sums, b_dots = b_totals, b_zeros
        for i in tl.static_range(GROUPS):
            b_more = b_more + (tl.dot(b_a[i], tl.trans(b_b), b_dots[i], input_precision=PRECISION),)
        b_dots = b_more
    return _add(b_dots, b_sums, GROUPS) if PART else b_dots


@triton.jit
def _add(b_x, b_y, GROUPS: tl.constexpr):
    """Sums of two tuples."""
    b_sums = ()
    for i in tl.static_range(GROUPS):
        b_sums = b_sums + (b_x[i] + b_y[i],)
    return b_sums


@triton.jit
def best_read(
    p_tokens,
    p_list,
    o_a,
    b_row_scale,
    b_tile_y,
    b_tile_x,
    begin,
    end,
    limit,
    channels,
    s_row,
    width,
    last_y,
    last_x,
    window,
    EVEN: tl.constexpr,
    FULL: tl.constexpr,
    PART: tl.constexpr,
    NEST: tl.constexpr,
    WINDOW: tl.constexpr,
    SY: tl.constexpr,
    SX: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The best destinations begin to end, for each of GROUPS groups of sources that are read again for each tile of
    destinations; what there is one of for each group is a tuple. `limit` ends the list. With WINDOW, destinations
    further away than that do not count."""
    o_j = tl.arange(0, BLOCK_N)
    b_best, b_best_token = (), ()
    for i in tl.static_range(GROUPS):
        b_best = b_best + (tl.full((BLOCK_M >> i,), float("-inf"), tl.float32),)
        b_best_token = b_best_token + (tl.full((BLOCK_M >> i,), INT_MAX, tl.int32),)
    b_next = load_words(p_list, begin, o_j, limit, FULL)
    for i_n in range(begin, end, BLOCK_N):
        o_b = destination_token(b_next) * s_row
        b_dots = _dots(
            *(p_tokens, o_a, o_b, channels), *(EVEN, PART, NEST, PRECISION, GROUPS, BLOCK_M, BLOCK_N, BLOCK_K)
        )
        b_next = load_words(p_list, tl.minimum(i_n + BLOCK_N, end - 1), o_j, limit, FULL)
        b_word = load_words(p_list, i_n, o_j, limit, FULL)
        b_destination, b_scale = destination_token(b_word), destination_scale(b_word)
        # NaN for what cannot be matched: less than anything. The row's own scale is applied before comparing: it can
        # round two values to one, and programs compare what is rounded.
        b_new, b_new_token = (), ()
        for i in tl.static_range(GROUPS):
            b_cosine = b_dots[i] * b_scale[None, :] * b_row_scale[i][:, None]
            if WINDOW:
                b_away_y = tl.abs(b_tile_y[i][:, None] - tl.minimum(b_destination // width // SY, last_y)[None, :])
                b_away_x = tl.abs(b_tile_x[i][:, None] - tl.minimum(b_destination % width // SX, last_x)[None, :])
                b_cosine = tl.where(tl.maximum(b_away_y, b_away_x) <= window, b_cosine, float("-inf"))
            b_high = tl.max(b_cosine, axis=1)
            b_high_token = tl.min(tl.where(b_cosine == b_high[:, None], b_destination[None, :], INT_MAX), axis=1)
            m_better = (b_high > b_best[i]) | ((b_high == b_best[i]) & (b_high_token < b_best_token[i]))
            b_new_token = b_new_token + (tl.where(m_better, b_high_token, b_best_token[i]),)
            b_new = b_new + (tl.where(m_better, b_high, b_best[i]),)
        b_best, b_best_token = b_new, b_new_token
    return b_best, b_best_token
