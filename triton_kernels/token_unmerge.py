"""Copying the slots of a plan back to every token, with a gate and a residual."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from ._common import EXACT, to_float32, unit_last_stride, unit_of
from .early import early, wait_for_predecessor
from .launching import cdiv, programs


@triton.jit(do_not_specialize=["n", "units", "plan_rows", "s_yb", "s_yn", "s_rb", "s_rn", "s_gb"])
def token_unmerge_kernel(
    p_y,
    p_slot,
    p_residual,
    p_gate,
    p_out,
    n,
    units,
    plan_rows,
    s_yb,
    s_yn,
    s_rb,
    s_rn,
    s_gb,
    UNIT: tl.constexpr,
    GATE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (block of channels, block of tokens, batch row): gate * y[slot] + residual, rounded once.

    Channels and strides count UNIT elements.
    """
    wait_for_predecessor(EARLY)
    i_c, i_t, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    channels = units * UNIT
    s_on = channels.to(tl.int64)
    m_t, m_c = o_t < n, o_c < channels
    m_x = m_t[:, None] & m_c[None, :]
    b_slot = tl.load(p_slot + (i_b % plan_rows) * n + o_t, mask=m_t, other=0).to(tl.int64)
    p_rows = p_y + i_b * s_yb * UNIT + b_slot[:, None] * (tl.cast(s_yn, tl.int64) * UNIT) + o_c[None, :]
    b_y = tl.load(p_rows, mask=m_x, other=0.0)
    if GATE:
        b_y = to_float32(b_y) * to_float32(tl.load(p_gate + i_b * s_gb * UNIT + o_c, mask=m_c, other=0.0))[None, :]
    if RESIDUAL:
        p_own = (
            p_residual + i_b * s_rb * UNIT + o_t.to(tl.int64)[:, None] * (tl.cast(s_rn, tl.int64) * UNIT) + o_c[None, :]
        )
        b_y = to_float32(b_y) + to_float32(tl.load(p_own, mask=m_x, other=0.0))
    p_own = p_out + i_b * n * s_on + o_t.to(tl.int64)[:, None] * s_on + o_c[None, :]
    tl.store(p_own, b_y.to(p_out.dtype.element_ty), mask=m_x)


def launch_token_unmerge(
    y: Tensor,
    slot: Tensor,
    offsets: Tensor,
    members: Tensor,
    anchor: Tensor,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    config: configs.Config | None = None,
) -> Tensor:
    """(B, M, C) slots to (B, N, C) tokens by slot, P dividing B; one launch.

    Args:
        y: (B, M, C).
        slot: (P, N) int32; the other tables are not looked at.
        residual: (B, N, C) added, or None.
        gate: (B, C) multiplied, or None.
        config: a candidate of `token_unmerge`.
    """
    y, slot = unit_last_stride(y), slot.contiguous()
    batch, _, channels = y.shape
    n = slot.shape[1]
    out = torch.empty((batch, n, channels), dtype=y.dtype, device=y.device)
    if out.numel() == 0:
        return out
    config = config or configs.pick("token_unmerge", y.device, out.numel() * out.element_size())
    own_residual = y if residual is None else unit_last_stride(residual)
    own_gate = y if gate is None else unit_last_stride(gate)
    strides = {
        "s_yb": y.stride(0),
        "s_yn": y.stride(1),
        "s_rb": own_residual.stride(0),
        "s_rn": own_residual.stride(1),
        "s_gb": own_gate.stride(0),
    }
    unit = unit_of(channels, *strides.values())
    programs(token_unmerge_kernel, cdiv(channels, config["BLOCK_C"]), cdiv(n, config["BLOCK_T"]), batch)(
        p_y=y,
        p_slot=slot,
        p_residual=own_residual,
        p_gate=own_gate,
        p_out=out,
        n=n,
        units=channels // unit,
        plan_rows=slot.shape[0],
        **{name: stride // unit for name, stride in strides.items()},
        UNIT=unit,
        GATE=gate is not None,
        RESIDUAL=residual is not None,
        **config,
        **early(y.device),
        **EXACT,
    )
    return out
