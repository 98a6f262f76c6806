"""Device code of `token_merge`: means over the members of slots, in an order that is written down.

A slot of up to LONG members is summed in ascending token order, as the reference does, to the bit. A longer one is
read STEPS * LANES members at a time, all loads before the first sum: `tree_sum` folds the STEPS of each lane, the lane
accumulates over the reads in order, and `tree_sum` folds the lanes. A slot of HUGE members or more is left to
`huge_mean`, a program for every HUGE_CHANNELS of its channels: a 32-byte sector of a 16-bit row, so that nothing is
read twice.

What that is for: all tokens alike, 2,867 of them in one slot of 320 channels. One program for 64 channels with 64 rows
in flight takes 45 round trips to memory (twice that, since a row's address is read first), on five multiprocessors.
Twenty programs with 512 rows (16 KiB) in flight each take six, on twenty; more rows would take registers from all
other programs. Counted, not measured.
"""

# Triton does not unpack tuples into others.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,misc,var-annotated"

from __future__ import annotations

import triton
import triton.language as tl

from ._common import INT_MAX, divide, norm_inverse, norm_shift, to_float32, tree_sum

LONG = tl.constexpr(32)
LOG2_LANES = tl.constexpr(5)
LOG2_STEPS = tl.constexpr(1)

# How many members of a short slot have their shifts summed before all channels lose them; a power of two. A sum of all
# shifts, carried from step to step beside those of the channels, has a layout of its own in Triton, in which tokens and
# words are loaded again.
TOGETHER = tl.constexpr(4)

HUGE = tl.constexpr(256)
HUGE_CHANNELS = tl.constexpr(16)
LOG2_HUGE_LANES = tl.constexpr(6)
# Bytes of each lane and channel in flight, as a power of two.
LOG2_HUGE_BYTES = tl.constexpr(4)
# How many positions of the list of members, HUGE apart, one program looks for huge slots at.
POSITIONS = tl.constexpr(16)


@triton.jit
def _load_channels(p_x, b_token, m_token, o_c, m_c, s_xn):
    """Channels o_c of tokens, (T, C), zero where masked."""
    # In the type of s_xn: int64 only where a row of the batch is as long as that.
    o_x = b_token[:, None] * s_xn + o_c[None, :]
    return tl.load(p_x + o_x, mask=m_token[:, None] & m_c[None, :], other=0.0)


@triton.jit
def _load_factors(p_weights, p_words, b_token, m_token, WEIGHTS: tl.constexpr, NORM: tl.constexpr):
    """Weights (T,) of tokens, the factor of their channels, and what is to be subtracted from each product.

    The normalized token, x * inverse - mean * inverse, takes one instruction a channel where it is summed.
    """
    b_weight = m_token.to(tl.float32)
    if WEIGHTS:
        b_weight = tl.load(p_weights + b_token, mask=m_token, other=0.0).to(tl.float32)
    b_factor, b_less = b_weight, b_weight
    if NORM:
        b_word = tl.load(p_words + b_token, mask=m_token, other=0)
        b_factor, b_less = norm_inverse(b_word), norm_shift(b_word)
        if WEIGHTS:
            b_factor, b_less = b_factor * b_weight, b_less * b_weight
    return b_weight, b_factor, b_less


@triton.jit
def _add(b_sum, b_x, b_factor, SCALED: tl.constexpr):
    return tl.fma(b_x, tl.broadcast_to(b_factor[:, None], b_x.shape), b_sum) if SCALED else b_sum + b_x


@triton.jit
def _lane_mean(
    p_x, p_weights, p_words, p_members, begin, size, o_c, m_c, s_xn, WEIGHTS: tl.constexpr,
    NORM: tl.constexpr, LOG2_OF_LANES: tl.constexpr, LOG2_OF_STEPS: tl.constexpr,
):  # fmt: skip
    """Mean (C,) float32 over members[begin : begin + size], size > 0."""
    NUM_LANES: tl.constexpr = 2**LOG2_OF_LANES
    NUM_STEPS: tl.constexpr = 2**LOG2_OF_STEPS
    CHANNELS: tl.constexpr = o_c.shape[0]
    o_j = tl.arange(0, NUM_STEPS * NUM_LANES)
    b_sum = tl.zeros((NUM_LANES, CHANNELS), tl.float32)
    b_total = tl.zeros((NUM_LANES,), tl.float32)
    for i in range(0, size, NUM_STEPS * NUM_LANES):
        m_j = i + o_j < size
        b_token = tl.load(p_members + begin + i + o_j, mask=m_j, other=0)
        b_weight, b_factor, b_less = _load_factors(p_weights, p_words, b_token, m_j, WEIGHTS, NORM)
        b_x = to_float32(_load_channels(p_x, b_token, m_j, o_c, m_c, s_xn))
        if WEIGHTS or NORM:
            b_x = b_x * b_factor[:, None]
        if NORM:
            b_x = b_x - b_less[:, None]
        b_steps = tl.trans(tl.reshape(b_x, (NUM_STEPS, NUM_LANES * CHANNELS)))
        b_sum += tl.reshape(tree_sum(b_steps, LOG2_OF_STEPS), (NUM_LANES, CHANNELS))
        if WEIGHTS:
            b_total += tree_sum(tl.trans(tl.reshape(b_weight, (NUM_STEPS, NUM_LANES))), LOG2_OF_STEPS)
    b_sum = tree_sum(tl.trans(b_sum), LOG2_OF_LANES)
    if WEIGHTS:
        b_divisor = tree_sum(b_total[None, :], LOG2_OF_LANES)
    else:
        b_divisor = (size + tl.zeros((1,), tl.int32)).to(tl.float32)
    return tl.div_rn(b_sum, tl.broadcast_to(b_divisor, (CHANNELS,)))


@triton.jit
def segment_mean(
    p_x,
    p_weights,
    p_words,
    p_members,
    b_begin,
    b_size,
    most,
    o_c,
    channels,
    s_xn,
    WEIGHTS: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCKS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Means over the members of each of BLOCK_M slots in channels o_c and in those that follow, BLOCKS times as many.

    A tensor (BLOCK_M, C) float32 for each block; anything where b_size is 0 or above LONG. No slot of up to LONG
    members has more than `most`.
    A thread that has the channels of several blocks needs the tables and addresses of its slot once. UNROLL members,
    a multiple of TOGETHER, are on their way before the first is added.
    """
    C: tl.constexpr = o_c.shape[0]
    b_sums = ()
    for _ in tl.static_range(BLOCKS):
        b_sums = b_sums + (tl.zeros((BLOCK_M, C), tl.float32),)
    b_total = tl.zeros((BLOCK_M,), tl.float32)
    b_short = tl.where(b_size <= LONG, b_size, 0)
    # What is left of the slots, so that masks and addresses within a step differ by constants.
    b_left, p_left = b_short, p_members + b_begin
    for _ in range(0, most, UNROLL):
        # All loads first.
        b_factors, b_rows = (), ()
        for j in tl.static_range(UNROLL):
            m_m = j < b_left
            b_token = tl.load(p_left + j, mask=m_m)
            b_factors = b_factors + (_load_factors(p_weights, p_words, b_token, m_m, WEIGHTS, NORM),)
            for i in tl.static_range(BLOCKS):
                b_row = _load_channels(p_x + i * C, b_token, m_m, o_c, o_c + i * C < channels, s_xn)
                b_rows = b_rows + (b_row,)
        b_less = tl.zeros((BLOCK_M,), tl.float32)
        for j in tl.static_range(UNROLL):
            b_weight, b_factor, b_own_less = b_factors[j]
            b_less = b_own_less if ((TOGETHER - 1) & j) == 0 else b_less + b_own_less
            b_more = ()
            for i in tl.static_range(BLOCKS):
                # What is masked is zero, and a sum is never -0, which adding 0 would change.
                b_sum = _add(b_sums[i], to_float32(b_rows[j * BLOCKS + i]), b_factor, WEIGHTS or NORM)
                if NORM and ((TOGETHER - 1) & (j + 1)) == 0:
                    b_sum = b_sum - b_less[:, None]
                b_more = b_more + (b_sum,)
            b_sums = b_more
            b_total += b_weight
        b_left -= UNROLL
        p_left += UNROLL
    if not WEIGHTS:
        b_total = tl.maximum(b_short, 1).to(tl.float32)
    b_inverse = tl.div_rn(1.0, b_total)[:, None]
    b_means = ()
    for i in tl.static_range(BLOCKS):
        if WEIGHTS:
            b_mean = tl.div_rn(b_sums[i], tl.broadcast_to(b_total[:, None], (BLOCK_M, C)))
        elif NORM:
            # Nothing that this is compared with to the bit: normalized tokens are rounded elsewhere.
            b_mean = b_sums[i] * b_inverse
        else:
            b_mean = divide(b_sums[i], b_total[:, None], b_inverse)
        b_means = b_means + (b_mean,)
    return b_means


@triton.jit
def long_mean(
    p_x, p_weights, p_words, p_members, begin, size, o_c, m_c, s_xn, WEIGHTS: tl.constexpr, NORM: tl.constexpr
):
    """Mean (C,) float32 of one slot of more than LONG members."""
    return _lane_mean(
        p_x, p_weights, p_words, p_members, begin, size, o_c, m_c, s_xn, WEIGHTS, NORM, LOG2_LANES, LOG2_STEPS
    )


@triton.jit
def add_long_means(
    b_sum, p_x, p_weights, p_words, p_members, b_begin, b_size, o_c, m_c, s_xn, WEIGHTS: tl.constexpr,
    NORM: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Means (BLOCK_M, C) of slots, with those of more than LONG members in their places."""
    if tl.max(b_size, 0) > LONG:
        o_m = tl.arange(0, BLOCK_M)
        for i_m in range(0, BLOCK_M):
            size = tl.sum(tl.where(o_m == i_m, b_size, 0), 0)
            if size > LONG:
                begin = tl.sum(tl.where(o_m == i_m, b_begin, 0), 0)
                b_long = long_mean(p_x, p_weights, p_words, p_members, begin, size, o_c, m_c, s_xn, WEIGHTS, NORM)
                b_sum = tl.where((o_m == i_m)[:, None], b_long[None, :], b_sum)
    return b_sum


@triton.jit
def huge_slots(p_slot, p_offsets, p_members, n, i_g):
    """The huge slots whose first position divisible by HUGE is one of the POSITIONS of group i_g.

    A slot of HUGE members or more holds such a position, and exactly one is its first, so each belongs to one group.
    Returns which positions begin one, and the slots, begins and sizes found there.
    """
    o_p = (i_g * POSITIONS + tl.arange(0, POSITIONS)) * HUGE
    m_p = o_p < n
    b_slot = tl.load(p_slot + tl.load(p_members + o_p, mask=m_p, other=0), mask=m_p, other=0)
    b_begin = tl.load(p_offsets + b_slot, mask=m_p, other=0)
    b_size = tl.load(p_offsets + b_slot + 1, mask=m_p, other=0) - b_begin
    return m_p & (b_size >= HUGE) & (o_p - b_begin < HUGE), b_slot, b_begin, b_size


@triton.jit
def huge_mean(
    p_x, p_weights, p_words, p_members, begin, size, o_c, m_c, s_xn, WEIGHTS: tl.constexpr, NORM: tl.constexpr
):
    """Mean (HUGE_CHANNELS,) float32 of one huge slot."""
    LOG2_ITEM: tl.constexpr = 1 if p_x.dtype.element_ty.primitive_bitwidth == 16 else 2
    # The statistics of a row take registers too.
    LOG2_STEPS_HERE: tl.constexpr = LOG2_HUGE_BYTES - LOG2_ITEM - (1 if NORM else 0)
    return _lane_mean(
        p_x, p_weights, p_words, p_members, begin, size, o_c, m_c, s_xn,
        WEIGHTS, NORM, LOG2_HUGE_LANES, LOG2_STEPS_HERE,
    )  # fmt: skip


@triton.jit
def largest_norm(p_norm, p_members, b_begin, b_size, BLOCK_M: tl.constexpr):
    """The largest norm among the members of each slot; NaN if one is NaN. Any order gives the same maximum."""
    # As integers, the bits of numbers that are not negative stand in their order, with NaN above infinity.
    b_largest = tl.zeros((BLOCK_M,), tl.int32)
    b_short = tl.where(b_size <= LONG, b_size, 0)
    for i in range(0, tl.max(b_short, 0), 4):
        for j in tl.static_range(4):
            m_m = i + j < b_short
            b_token = tl.load(p_members + b_begin + i + j, mask=m_m, other=0)
            b_bits = tl.load(p_norm + b_token, mask=m_m, other=0.0).to(tl.int32, bitcast=True) & INT_MAX
            b_largest = tl.maximum(b_largest, b_bits)
    if tl.max(b_size, 0) > LONG:
        o_m, o_l = tl.arange(0, BLOCK_M), tl.arange(0, 1024)
        for i_m in range(0, BLOCK_M):
            size = tl.sum(tl.where(o_m == i_m, b_size, 0), 0)
            if size > LONG:
                begin = tl.sum(tl.where(o_m == i_m, b_begin, 0), 0)
                b_bits = tl.zeros((1024,), tl.int32)
                for i in range(0, size, 1024):
                    b_token = tl.load(p_members + begin + i + o_l, mask=i + o_l < size, other=0)
                    b_norm = tl.load(p_norm + b_token, mask=i + o_l < size, other=0.0)
                    b_bits = tl.maximum(b_bits, b_norm.to(tl.int32, bitcast=True) & INT_MAX)
                b_largest = tl.where(o_m == i_m, tl.max(b_bits, 0), b_largest)
    return b_largest.to(tl.float32, bitcast=True)
