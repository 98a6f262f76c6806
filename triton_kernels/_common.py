"""What the kernels share: constants, helpers for device code, and helpers for launchers.

Every kernel gives the same bits under every config. Sums therefore never use `tl.sum` on floats, whose order follows
the register layout: they accumulate elementwise over channel blocks of one width, and the block is folded by
`tree_sum`, whose order is written down; or each lane adds up the channels of 16 bytes, in an order that is written down
(`elements`), and `tree_sum` folds the lanes. (Attention does sum rows of scores with `tl.sum`; attention.py says
why that is one order.) Kernels are launched with EXACT, which keeps the compiler from contracting a multiplication and
an addition in one config and not in another.
"""

# Triton does not unpack tuples into others.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Channels handled at a time: 128 bytes of a 16-bit row, so that gathered rows are read in whole cache lines.
CHANNELS = tl.constexpr(64)
LOG2_CHANNELS = tl.constexpr(6)
INT_MAX = tl.constexpr(0x7FFFFFFF)
INT_MIN = tl.constexpr(-0x80000000)
EXACT = {"enable_fp_fusion": False}
MAX_TOKENS = 65_536
# Elements in 16 bytes of a 16-bit row. Strides and channels that it divides reach a kernel in this unit, so that the
# compiler sees that rows are aligned: by itself Triton notices multiples of 16 only, which 72 is not.
UNIT = 8
_STEPS = 8
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def to_float32(b_x):
    """`b_x.to(tl.float32)`, by shifting the bits of bfloat16: for cvt.f32.bf16, ptxas takes two instructions of every
    second element."""
    # In one statement, as the report cannot tell which dtype is meant.
    return (
        (b_x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        if b_x.dtype == tl.bfloat16
        else b_x.to(tl.float32)
    )


@triton.jit
def tree_sum(b_x, LEVELS: tl.constexpr):
    """Sum over the last axis of (T, 2 ** LEVELS): neighbours are added, then neighbours of the sums, and so on."""
    ROWS: tl.constexpr = b_x.shape[0]
    for _ in tl.static_range(LEVELS):
        b_even, b_odd = tl.split(tl.reshape(b_x, (ROWS, b_x.shape[1] // 2, 2)))
        b_x = b_even + b_odd
    return tl.reshape(b_x, (ROWS,))


@triton.jit
def elements(b_x, ROWS: tl.constexpr, LANES: tl.constexpr, LEVELS: tl.constexpr):
    """The 2 ** LEVELS channels of every lane apart: a tuple of tensors (ROWS, LANES)."""
    b_parts = (b_x,)
    for i in tl.static_range(LEVELS):
        b_more = ()
        for j in tl.static_range(2**i):
            b_even, b_odd = tl.split(tl.reshape(b_parts[j], (ROWS, LANES, 2 ** (LEVELS - i - 1), 2)))
            b_more = b_more + (b_even, b_odd)
        b_parts = b_more
    b_flat = ()
    for j in tl.static_range(2**LEVELS):
        b_flat = b_flat + (tl.reshape(b_parts[j], (ROWS, LANES)),)
    return b_flat


@triton.jit
def add_squares(b_sum, b_x, LANES: tl.constexpr, LOG2_VECTOR: tl.constexpr):
    """b_sum (ROWS, LANES) plus the squares of what each lane has of b_x (ROWS, LANES * 2 ** LOG2_VECTOR)."""
    b_parts = elements(b_x, b_x.shape[0], LANES, LOG2_VECTOR)
    for i in tl.static_range(2**LOG2_VECTOR):
        b_sum = tl.fma(b_parts[i], b_parts[i], b_sum)
    return b_sum


@triton.jit
def side_by_side(b_parts, LEVELS: tl.constexpr):
    """2 ** LEVELS tensors (ROWS, LANES) as one, (ROWS, LANES, 2, ..., 2), the first of all at the first place."""
    for i in tl.static_range(LEVELS):
        b_more = ()
        for j in tl.static_range(2 ** (LEVELS - i - 1)):
            b_more = b_more + (tl.join(b_parts[j], b_parts[j + 2 ** (LEVELS - i - 1)]),)
        b_parts = b_more
    return b_parts[0]


@triton.jit
def divide(b_x, b_n, b_inverse):
    """b_x / b_n to the last bit, where b_n are whole numbers up to 32 and b_inverse is 1 / b_n, rounded.

    One step of Newton's method, in a quarter of the instructions of a division. For all these b_n it was compared with
    the division at every mantissa. Where the quotient is infinite or NaN the rest is NaN, and is put aside by the
    minimum. Subnormal quotients may be off by one in their last bit.
    """
    b_y = b_x * b_inverse
    return tl.fma(tl.minimum(tl.fma(-b_y, b_n, b_x), 3e38), b_inverse, b_y)


@triton.jit
def divide_by_constant(b_x, N: tl.constexpr):
    """b_x / N; a power of two divides exactly by its reciprocal."""
    return b_x * (1.0 / N) if (N & (N - 1)) == 0 else tl.div_rn(b_x, N * 1.0)


@triton.jit
def inverse_norm(b_squares):
    """1 / sqrt of sums of squares; 0 marks a token without direction: zero, NaN, or a norm that overflows."""
    b_norm = tl.sqrt_rn(b_squares)
    m_usable = (b_norm > 0.0) & (b_norm < float("inf"))
    return tl.where(m_usable, tl.div_rn(1.0, tl.where(m_usable, b_norm, 1.0)), 0.0)


@triton.jit
def ordered_key(b_value):
    """int32 keys in the order of float32 values that are not NaN; both zeros get one key."""
    b_bits = tl.where(b_value == 0.0, 0.0, b_value).to(tl.int32, bitcast=True)
    return b_bits ^ ((b_bits >> 31) & INT_MAX)


@triton.jit
def pack(b_key, b_index):
    """(key, index) as one int64 whose maximum is the highest key and, among equals, the lowest index."""
    return (b_key.to(tl.int64) << 32) | (b_index ^ INT_MAX).to(tl.int64)


@triton.jit
def unpack_index(b_packed):
    return (b_packed & INT_MAX).to(tl.int32) ^ INT_MAX


@triton.jit
def unpack_key(b_packed):
    return (b_packed >> 32).to(tl.int32)


@triton.jit
def key_to_float(b_key):
    """The float32 value of an `ordered_key`."""
    return (b_key ^ ((b_key >> 31) & INT_MAX)).to(tl.float32, bitcast=True)


@triton.jit
def destination_word(b_token, b_inverse_norm):
    """A destination and its inverse norm as one int64; the norm of one without direction is NaN, so that its
    similarities are, and never better than another."""
    b_scale = tl.where(b_inverse_norm > 0.0, b_inverse_norm, float("nan"))
    return (b_scale.to(tl.int32, bitcast=True).to(tl.int64) << 32) | b_token.to(tl.int64)


@triton.jit
def destination_token(b_word):
    return b_word.to(tl.int32)


@triton.jit
def destination_scale(b_word):
    return (b_word >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def norm_word(b_inverse, b_shift):
    """What a LayerNorm makes of a token, x * inverse - shift, as one int64, which is one load."""
    b_high, b_low = b_inverse.to(tl.int32, bitcast=True), b_shift.to(tl.uint32, bitcast=True)
    return (b_high.to(tl.int64) << 32) | b_low.to(tl.int64)


@triton.jit
def norm_inverse(b_word):
    return (b_word >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def norm_shift(b_word):
    return b_word.to(tl.int32).to(tl.float32, bitcast=True)


def step_of(channels: int, most: int) -> int:
    """Channels that a program sums side by side: CHANNELS, or twice that and so on up to `most`, where over 8 steps
    are left otherwise and no step is half empty. It depends on the number of channels alone, so that every config adds
    up in one order.
    """
    blocks, step = -(-channels // CHANNELS.value), CHANNELS.value
    while blocks > _STEPS and blocks % 2 == 0 and step < most:
        blocks, step = blocks // 2, 2 * step
    return step


def norm_step(channels: int) -> int:
    """Channels of a step where the norms are found that matching divides by, whichever kernel finds them."""
    return step_of(channels, 256)


def unit_of(*counts: int) -> int:
    """UNIT if it divides all of these channels and strides, else 1."""
    return 1 if any(count % UNIT for count in counts) else UNIT


def unit_last_stride(x: Tensor) -> Tensor:
    """`x`, copied only when its last dimension is not contiguous: kernels take all other strides as they are."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def check_tokens(n: int) -> None:
    """Token indices and counts are packed into 16 bits by the plan kernels."""
    if n > MAX_TOKENS:
        raise ValueError(f"grid: got {n} tokens, expected at most {MAX_TOKENS} with the Triton backend")
