"""What the kernels share: constants, helpers for device code, and helpers for launchers.

Every kernel gives the same bits under every config. Sums therefore never use `tl.sum` on floats, whose order follows
the register layout: they accumulate elementwise over channel blocks of the constant width CHANNELS, and the block is
folded by `tree_sum`, whose order is written down. (Attention does sum rows of scores with `tl.sum`; attention.py says
why that is one order.) Kernels are launched with EXACT, which keeps the compiler from contracting a multiplication and
an addition in one config and not in another.
"""

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
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def tree_sum(b_x, LEVELS: tl.constexpr):
    """Sum over the last axis of (T, 2 ** LEVELS): neighbours are added, then neighbours of the sums, and so on."""
    ROWS: tl.constexpr = b_x.shape[0]
    for _ in tl.static_range(LEVELS):
        b_even, b_odd = tl.split(tl.reshape(b_x, (ROWS, b_x.shape[1] // 2, 2)))
        b_x = b_even + b_odd
    return tl.reshape(b_x, (ROWS,))


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


def unit_last_stride(x: Tensor) -> Tensor:
    """`x`, copied only when its last dimension is not contiguous: kernels take all other strides as they are."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def check_tokens(n: int) -> None:
    """Token indices and counts are packed into 16 bits by the plan kernels."""
    if n > MAX_TOKENS:
        raise ValueError(f"grid: got {n} tokens, expected at most {MAX_TOKENS} with the Triton backend")
