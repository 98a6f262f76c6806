"""Floating-point operations of a row of a model, counted while it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ...methods import CompressionConfig
from ..compression import compressed
from ..denoisers import Denoiser


def _attention_on_cpu(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


def counter() -> FlopCounterMode:
    """Of torch, with the one attention that it has no formula for, that of its flash kernel on the CPU."""
    own = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_on_cpu}
    return FlopCounterMode(display=False, custom_mapping=own)


@torch.no_grad()
def row_flops(denoiser: Denoiser, compression: CompressionConfig | None) -> int:
    """FLOPs of one row of a forward pass, planning among them."""
    device = next(denoiser.model.parameters()).device
    noisy = torch.zeros(1, *denoiser.sample_shape, device=device)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    with compressed(denoiser, compression), counter() as counted:
        denoiser(noisy, zero, zero)
    return int(counted.get_total_flops())
