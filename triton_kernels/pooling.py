"""Device code that pools the windows of IE-KVD while tokens are loaded."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._common import divide_by_constant, to_float32

# Windows up to this size are unrolled, so that all their loads are in flight at once. Beside the tiles of a matrix
# product larger ones would not fit registers.
UNROLLED = tl.constexpr(4)


@triton.jit
def nearest(o_out, size, out):
    """(2 * o_out + 1) * size // (2 * out) with no number past 3 * size, where the product would pass 32 bits."""
    whole = size // out
    rest = size - whole * out
    return o_out * whole + (whole * out + (2 * o_out + 1) * rest) // (2 * out)


@triton.jit
def window_of(o_t, height, width, SY: tl.constexpr, SX: tl.constexpr):
    """Tokens of pooled tokens: the corner of the window, and the nearest one by the nearest-exact rule."""
    out_y, out_x = height // SY, width // SX
    o_row, o_column = o_t // out_x, o_t % out_x
    o_corner = o_row * SY * width + o_column * SX
    o_near = nearest(o_row, height, out_y) * width + nearest(o_column, width, out_x)
    return o_corner, o_near


@triton.jit
def load_pooled(
    p_corner,
    p_near,
    m_x,
    m_pooled,
    s_row,
    s_n,
    window,
    alpha,
    beta,
    SY: tl.constexpr,
    SX: tl.constexpr,
    DIVIDES: tl.constexpr,
    ALPHA: tl.constexpr,
    WHOLE: tl.constexpr,
    UNROLL: tl.constexpr = UNROLLED,
):
    """alpha * nearest + beta * average of the windows behind a block of pointers, in the dtype behind them.

    One order of operations for all kernels, so one result to the bit. With WHOLE, only the rows of
    m_pooled are windows; the others are single tokens, at p_corner and at p_near. window is SY * SX as a number that
    the compiler does not know, lest it unroll large windows. p_near is read when ALPHA is "one" and when the factor
    does not divide the grid; otherwise the nearest token is the middle one of the window.
    """
    if ALPHA == "one":
        return tl.load(p_near, mask=m_x, other=0.0)
    m_rest = m_x
    if WHOLE:
        m_rest = m_x & m_pooled
    b_first = to_float32(tl.load(p_corner, mask=m_x, other=0.0))
    b_sum = b_first
    b_near = b_first
    if not DIVIDES and ALPHA != "zero":
        b_near = to_float32(tl.load(p_near, mask=m_rest, other=0.0))
    if SY * SX <= UNROLL:
        for i in tl.static_range(1, SY * SX):
            b_x = to_float32(tl.load(p_corner + (i // SX * s_row + i % SX * s_n), mask=m_rest, other=0.0))
            b_sum += b_x
            if DIVIDES and i == SY // 2 * SX + SX // 2:
                b_near = b_x
    else:
        for i in range(1, window):
            b_x = to_float32(tl.load(p_corner + (i // SX * s_row + i % SX * s_n), mask=m_rest, other=0.0))
            b_sum += b_x
            if DIVIDES:
                b_near = tl.where(i == SY // 2 * SX + SX // 2, b_x, b_near)
    b_average = divide_by_constant(b_sum, SY * SX)
    b_y = b_average
    if ALPHA != "zero":
        b_y = alpha * b_near + beta * b_average
    if ALPHA == "rows":
        # What has weight zero is left out: zero times an infinite token would be NaN.
        b_y = tl.where(alpha == 1.0, b_near, tl.where(alpha == 0.0, b_average, b_y))
    if WHOLE:
        b_y = tl.where(m_pooled, b_y, b_first)
    return b_y.to(p_corner.dtype.element_ty)


def alpha_arguments(alpha: float | Tensor, unused: Tensor) -> dict[str, Any]:
    """What a kernel is told of alpha. ALPHA: "one" and "zero" (nothing to blend), "number", or "rows" (p_alpha)."""
    if isinstance(alpha, Tensor):
        return {"p_alpha": alpha.contiguous(), "alpha": 0.0, "beta": 0.0, "ALPHA": "rows"}
    number = float(alpha)
    kind = {0.0: "zero", 1.0: "one"}.get(number, "number")
    return {"p_alpha": unused, "alpha": number, "beta": 1.0 - number, "ALPHA": kind}
