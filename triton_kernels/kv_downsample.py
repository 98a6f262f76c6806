"""Interpolate-extrapolate downsampling of keys and values, several tensors in one launch (IE-KVD, BiGain)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from ._common import EXACT, unit_last_stride, unit_of
from .early import early, wait_for_predecessor
from .launching import cdiv, programs
from .pooling import alpha_arguments, load_pooled, window_of

# Tensors a launch takes; longer lists take several launches.
SLOTS = 4
# Windows up to this size are unrolled: nothing else needs the registers.
UNROLLED = tl.constexpr(16)


@triton.jit
def _pool(
    p_x,
    p_y,
    units,
    s_xb,
    s_xn,
    i_c,
    i_t,
    i_b,
    height,
    width,
    window,
    alpha,
    beta,
    UNIT: tl.constexpr,
    SY: tl.constexpr,
    SX: tl.constexpr,
    DIVIDES: tl.constexpr,
    ALPHA: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tokens, channels = (height // SY) * (width // SX), units * UNIT
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_y = (o_t < tokens)[:, None] & (o_c < channels)[None, :]
    o_corner, o_near = window_of(o_t, height, width, SY, SX)
    p_rows, s_n = p_x + i_b * s_xb * UNIT + o_c[None, :], tl.cast(s_xn, tl.int64) * UNIT
    b_y = load_pooled(
        p_rows + o_corner[:, None] * s_n, p_rows + o_near[:, None] * s_n, m_y, m_y,
        width * s_n, s_n, window, alpha, beta, SY, SX, DIVIDES, ALPHA, False, UNROLLED,
    )  # fmt: skip
    tl.store(p_y + (i_b * tokens + o_t)[:, None] * channels + o_c[None, :], b_y, mask=m_y)


_INTEGERS = ["height", "width", "window", "batch"]


@triton.jit(
    do_not_specialize=[*_INTEGERS, *(f"{name}{i}" for name in ("units_", "s_xb", "s_xn") for i in range(SLOTS))]
)
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
    units_0,
    units_1,
    units_2,
    units_3,
    s_xb0,
    s_xb1,
    s_xb2,
    s_xb3,
    s_xn0,
    s_xn1,
    s_xn2,
    s_xn3,
    height,
    width,
    window,
    batch,
    alpha,
    beta,
    UNIT: tl.constexpr,
    ALPHA: tl.constexpr,
    TENSORS: tl.constexpr,
    SY: tl.constexpr,
    SX: tl.constexpr,
    DIVIDES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (block of channels, block of pooled tokens, tensor and batch row).

    Channels and strides of the tensors count UNIT elements.

    ALPHA says where alpha comes from: "one" and "zero" from nowhere, "number" from `alpha`, "rows" from p_alpha (B,).
    """
    wait_for_predecessor(EARLY)
    i_c, i_t, i_z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_tensor, i_b = i_z // batch, (i_z % batch).to(tl.int64)
    if ALPHA == "rows":
        alpha = tl.load(p_alpha + i_b)
        beta = 1.0 - alpha
    # A branch per tensor: what the compiler knows about each pointer's alignment survives.
    if i_tensor == 0:
        _pool(
            p_x0, p_y0, units_0, s_xb0, s_xn0, i_c, i_t, i_b, height, width, window, alpha, beta, UNIT,
            SY, SX, DIVIDES, ALPHA, BLOCK_T, BLOCK_C,
        )  # fmt: skip
    if TENSORS > 1:
        if i_tensor == 1:
            _pool(
                p_x1, p_y1, units_1, s_xb1, s_xn1, i_c, i_t, i_b, height, width, window, alpha, beta, UNIT,
                SY, SX, DIVIDES, ALPHA, BLOCK_T, BLOCK_C,
            )  # fmt: skip
    if TENSORS > 2:
        if i_tensor == 2:
            _pool(
                p_x2, p_y2, units_2, s_xb2, s_xn2, i_c, i_t, i_b, height, width, window, alpha, beta, UNIT,
                SY, SX, DIVIDES, ALPHA, BLOCK_T, BLOCK_C,
            )  # fmt: skip
    if TENSORS > 3:
        if i_tensor == 3:
            _pool(
                p_x3, p_y3, units_3, s_xb3, s_xn3, i_c, i_t, i_b, height, width, window, alpha, beta, UNIT,
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
        unit = unit_of(*(count for x in inputs for count in (x.shape[2], x.stride(0), x.stride(1))))
        places = [(i if i < tensors else 0) for i in range(SLOTS)]
        blocks = (cdiv(largest, picked["BLOCK_C"]), cdiv(tokens, picked["BLOCK_T"]), tensors * batch)
        programs(kv_downsample_kernel, *blocks)(
            **{f"p_x{i}": inputs[j] for i, j in enumerate(places)},
            **{f"p_y{i}": outputs[j] for i, j in enumerate(places)},
            **{f"units_{i}": inputs[j].shape[2] // unit for i, j in enumerate(places)},
            **{f"s_xb{i}": inputs[j].stride(0) // unit for i, j in enumerate(places)},
            **{f"s_xn{i}": inputs[j].stride(1) // unit for i, j in enumerate(places)},
            height=height,
            width=width,
            window=sy * sx,
            batch=batch,
            UNIT=unit,
            **alpha_arguments(alpha, inputs[0]),
            TENSORS=tensors,
            SY=sy,
            SX=sx,
            DIVIDES=height % sy == 0 and width % sx == 0,
            **picked,
            **early(inputs[0].device),
            **EXACT,
        )
    return ys
