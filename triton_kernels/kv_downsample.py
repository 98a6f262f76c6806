"""Interpolate-extrapolate downsampling of keys and values, several tensors in one launch (IE-KVD, BiGain)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from ._common import EXACT, unit_last_stride
from .launching import programs

# Tensors a launch takes; longer lists take several launches.
SLOTS = 4
# Windows up to this size are unrolled, so that all their loads are in flight at once.
UNROLLED = tl.constexpr(16)


@triton.jit
def _pool(
    p_x,
    p_y,
    channels,
    s_xb,
    s_xn,
    s_yn,
    i_c,
    i_t,
    i_b,
    height,
    width,
    alpha,
    beta,
    SY: tl.constexpr,
    SX: tl.constexpr,
    DIVIDES: tl.constexpr,
    ALPHA: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    out_y, out_x = height // SY, width // SX
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_y = (o_t < out_y * out_x)[:, None] & (o_c < channels)[None, :]
    o_row, o_column = o_t // out_x, o_t % out_x
    p_rows = p_x + i_b * s_xb + o_c[None, :]
    o_corner = (o_row * SY * width + o_column * SX).to(tl.int64)
    # The nearest-exact rule. When the factor divides the grid this is the middle token of the window, read anyway.
    o_near = ((2 * o_row + 1) * height // (2 * out_y)) * width + (2 * o_column + 1) * width // (2 * out_x)
    p_near = p_rows + o_near.to(tl.int64)[:, None] * s_xn
    p_out = p_y + (i_b * (out_y * out_x) + o_t)[:, None] * s_yn + o_c[None, :]
    if ALPHA == "one":
        tl.store(p_out, tl.load(p_near, mask=m_y), mask=m_y)
        return
    b_near = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    if not DIVIDES and ALPHA != "zero":
        b_near = tl.load(p_near, mask=m_y, other=0.0).to(tl.float32)
    b_sum = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    if SY * SX <= UNROLLED:
        for i in tl.static_range(SY * SX):
            o_n = o_corner + i // SX * width + i % SX
            b_x = tl.load(p_rows + o_n[:, None] * s_xn, mask=m_y, other=0.0).to(tl.float32)
            b_sum += b_x
            if DIVIDES and i == SY // 2 * SX + SX // 2:
                b_near = b_x
    else:
        for i in range(0, SY * SX):
            o_n = o_corner + i // SX * width + i % SX
            b_x = tl.load(p_rows + o_n[:, None] * s_xn, mask=m_y, other=0.0).to(tl.float32)
            b_sum += b_x
            if DIVIDES:
                b_near = tl.where(i == SY // 2 * SX + SX // 2, b_x, b_near)
    b_average = tl.div_rn(b_sum, SY * SX * 1.0)
    b_y = b_average
    if ALPHA != "zero":
        b_y = alpha * b_near + beta * b_average
    if ALPHA == "rows":
        # What has weight zero is left out: zero times an infinite token would be NaN.
        b_y = tl.where(alpha == 1.0, b_near, tl.where(alpha == 0.0, b_average, b_y))
    tl.store(p_out, b_y.to(p_y.dtype.element_ty), mask=m_y)


@triton.jit(do_not_specialize=["height", "width", "batch"])
def kv_downsample_kernel(
    p_x0,
    p_x1,
    p_x2,
    p_x3,
    p_alpha,
    p_y0,
    p_y1,
    p_y2,
    p_y3,
    channels_0,
    channels_1,
    channels_2,
    channels_3,
    s_xb0,
    s_xb1,
    s_xb2,
    s_xb3,
    s_xn0,
    s_xn1,
    s_xn2,
    s_xn3,
    s_yn0,
    s_yn1,
    s_yn2,
    s_yn3,
    height,
    width,
    batch,
    alpha,
    beta,
    ALPHA: tl.constexpr,
    TENSORS: tl.constexpr,
    SY: tl.constexpr,
    SX: tl.constexpr,
    DIVIDES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Program (block of channels, block of pooled tokens, tensor and batch row).

    ALPHA says where alpha comes from: "one" and "zero" from nowhere, "number" from `alpha`, "rows" from p_alpha (B,).
    """
    i_c, i_t, i_z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_tensor, i_b = i_z // batch, (i_z % batch).to(tl.int64)
    if ALPHA == "rows":
        alpha = tl.load(p_alpha + i_b)
        beta = 1.0 - alpha
    # A branch per tensor: what the compiler knows about each pointer's alignment survives.
    if i_tensor == 0:
        _pool(
            p_x0, p_y0, channels_0, s_xb0, s_xn0, s_yn0, i_c, i_t, i_b, height, width, alpha, beta,
            SY, SX, DIVIDES, ALPHA, BLOCK_T, BLOCK_C,
        )  # fmt: skip
    if TENSORS > 1:
        if i_tensor == 1:
            _pool(
                p_x1, p_y1, channels_1, s_xb1, s_xn1, s_yn1, i_c, i_t, i_b, height, width, alpha, beta,
                SY, SX, DIVIDES, ALPHA, BLOCK_T, BLOCK_C,
            )  # fmt: skip
    if TENSORS > 2:
        if i_tensor == 2:
            _pool(
                p_x2, p_y2, channels_2, s_xb2, s_xn2, s_yn2, i_c, i_t, i_b, height, width, alpha, beta,
                SY, SX, DIVIDES, ALPHA, BLOCK_T, BLOCK_C,
            )  # fmt: skip
    if TENSORS > 3:
        if i_tensor == 3:
            _pool(
                p_x3, p_y3, channels_3, s_xb3, s_xn3, s_yn3, i_c, i_t, i_b, height, width, alpha, beta,
                SY, SX, DIVIDES, ALPHA, BLOCK_T, BLOCK_C,
            )  # fmt: skip


def launch_kv_downsample(
    xs: Sequence[Tensor],
    grid: tuple[int, int],
    factor: tuple[int, int],
    alpha: float | Tensor,
    config: configs.Config | None = None,
) -> list[Tensor]:
    """Every x (B, N, C) to (B, (H // sy) * (W // sx), C); one launch for up to four tensors.

    Args:
        xs: tensors of one B and N on one device; their C, dtypes and strides may differ.
        grid: (H, W).
        factor: (sy, sx).
        alpha: a number or a (B,) float32 tensor.
        config: a candidate of `kv_downsample`.
    """
    (height, width), (sy, sx) = grid, factor
    batch, tokens = xs[0].shape[0], (height // sy) * (width // sx)
    ys = [torch.empty((batch, tokens, x.shape[2]), dtype=x.dtype, device=x.device) for x in xs]
    row_alpha = isinstance(alpha, Tensor)
    number = 0.0 if isinstance(alpha, Tensor) else float(alpha)
    for start in range(0, len(xs), SLOTS):
        # Unused places repeat the first tensor; no program looks at them.
        inputs = [unit_last_stride(x) for x in xs[start : start + SLOTS]]
        outputs = ys[start : start + SLOTS]
        tensors = len(inputs)
        largest = max(x.shape[2] for x in inputs)
        if batch * tokens * largest == 0:
            continue
        picked = config or configs.pick(
            "kv_downsample", inputs[0].device, sum(x.numel() * x.element_size() for x in inputs)
        )
        places = [(i if i < tensors else 0) for i in range(SLOTS)]
        blocks = (triton.cdiv(largest, picked["BLOCK_C"]), triton.cdiv(tokens, picked["BLOCK_T"]), tensors * batch)
        programs(kv_downsample_kernel, *blocks)(
            **{f"p_x{i}": inputs[j] for i, j in enumerate(places)},
            p_alpha=alpha if row_alpha else inputs[0],
            **{f"p_y{i}": outputs[j] for i, j in enumerate(places)},
            **{f"channels_{i}": inputs[j].shape[2] for i, j in enumerate(places)},
            **{f"s_xb{i}": inputs[j].stride(0) for i, j in enumerate(places)},
            **{f"s_xn{i}": inputs[j].stride(1) for i, j in enumerate(places)},
            **{f"s_yn{i}": inputs[j].shape[2] for i, j in enumerate(places)},
            height=height,
            width=width,
            batch=batch,
            alpha=number,
            beta=1.0 - number,
            ALPHA="rows" if row_alpha else {0.0: "zero", 1.0: "one"}.get(number, "number"),
            TENSORS=tensors,
            SY=sy,
            SX=sx,
            DIVIDES=height % sy == 0 and width % sx == 0,
            **picked,
            **EXACT,
        )
    return ys
