"""Statistics of each token, for calls in which no score pass has computed them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from ._common import EXACT, UNIT, norm_word, step_of, to_float32, tree_sum, unit_of
from .early import early, wait_for_predecessor
from .launching import cdiv, programs

# Wider steps spill registers where their sums are folded.
_WIDEST = 128


@triton.jit(do_not_specialize=["n", "units", "s_xb", "s_xn"])
def row_stats_kernel(
    p_x,
    p_stats,
    n,
    units,
    s_xb,
    s_xn,
    eps,
    UNIT: tl.constexpr,
    LAYERNORM: tl.constexpr,
    STEP: tl.constexpr,
    LOG2_STEP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (block of tokens, batch row), STEP channels at a time. Channels and strides count UNIT elements."""
    wait_for_predecessor(EARLY)
    i_t, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_c = tl.arange(0, STEP)
    channels = units * UNIT
    m_t = o_t < n
    p_rows = p_x + i_b * s_xb * UNIT + o_t.to(tl.int64)[:, None] * (tl.cast(s_xn, tl.int64) * UNIT) + o_c[None, :]

    b_mean = tl.zeros((BLOCK_T,), tl.float32)
    if LAYERNORM:
        b_sum = tl.zeros((BLOCK_T, STEP), tl.float32)
        b_next = tl.load(p_rows, mask=m_t[:, None] & (o_c < channels)[None, :], other=0.0)
        for i_c in range(STEP, channels + STEP, STEP):
            b_x = b_next
            b_next = tl.load(p_rows + i_c, mask=m_t[:, None] & (i_c + o_c < channels)[None, :], other=0.0)
            b_sum += to_float32(b_x)
        b_mean = tl.div_rn(tree_sum(b_sum, LOG2_STEP), tl.cast(channels, tl.float32))

    # The second read of a row comes from the cache. Squares of deviations do not cancel as E[x^2] - E[x]^2 does.
    b_squares = tl.zeros((BLOCK_T, STEP), tl.float32)
    b_next = tl.load(p_rows, mask=m_t[:, None] & (o_c < channels)[None, :], other=0.0)
    for i_c in range(0, channels, STEP):
        m_x, b_x = m_t[:, None] & (i_c + o_c < channels)[None, :], to_float32(b_next)
        b_next = tl.load(p_rows + i_c + STEP, mask=m_t[:, None] & (i_c + STEP + o_c < channels)[None, :], other=0.0)
        b_x = tl.where(m_x, b_x - b_mean[:, None], 0.0)
        b_squares = tl.fma(b_x, b_x, b_squares)
    b_total = tree_sum(b_squares, LOG2_STEP)

    o_out = i_b * n + o_t
    if LAYERNORM:
        b_variance = tl.div_rn(b_total, tl.cast(channels, tl.float32))
        b_inverse = tl.div_rn(1.0, tl.sqrt_rn(b_variance + eps))
        tl.store(p_stats + o_out, norm_word(b_inverse, b_mean * b_inverse), mask=m_t)
    else:
        tl.store(p_stats + o_out, tl.sqrt_rn(b_total), mask=m_t)


def launch_row_stats(x: Tensor, stats: str, eps: float = 0.0, config: configs.Config | None = None) -> Tensor:
    """Per-token statistics of x (B, N, C), unit last stride.

    Args:
        x: tokens.
        stats: "norm" or "layernorm".
        eps: added to the variance under the root; read with "layernorm" only.
        config: a candidate of `row_stats`.

    Returns:
        "norm": the L2 norms (B, N) float32; "layernorm": (B, N) int64, the words of `norm_word`.
    """
    batch, n, channels = x.shape
    dtype = torch.int64 if stats == "layernorm" else torch.float32
    found = torch.empty((batch, n), dtype=dtype, device=x.device)
    if found.numel() == 0:
        return found
    config = config or configs.pick("row_stats", x.device, x.numel() * x.element_size())
    step, unit = step_of(channels, _WIDEST), unit_of(channels, x.stride(0), x.stride(1))
    block = max(config["VECTORS"] * UNIT // step, 1)
    programs(row_stats_kernel, cdiv(n, block), batch)(
        p_x=x,
        p_stats=found,
        n=n,
        units=channels // unit,
        s_xb=x.stride(0) // unit,
        s_xn=x.stride(1) // unit,
        eps=eps,
        UNIT=unit,
        LAYERNORM=stats == "layernorm",
        STEP=step,
        LOG2_STEP=step.bit_length() - 1,
        BLOCK_T=block,
        **{name: value for name, value in config.items() if name != "VECTORS"},
        **early(x.device),
        **EXACT,
    )
    return found
