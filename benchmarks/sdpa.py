"""PyTorch's attention with the fastest backend of this machine, so that nothing is compared with a slow one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from bigain_kernels.timing import Call, time_cuda

_CAN_USE = {
    SDPBackend.FLASH_ATTENTION: can_use_flash_attention,
    SDPBackend.CUDNN_ATTENTION: can_use_cudnn_attention,
    SDPBackend.EFFICIENT_ATTENTION: can_use_efficient_attention,
}


def backends_for(q: Tensor, k: Tensor, v: Tensor) -> list[SDPBackend]:
    """The fused backends that take these (B, heads, tokens, d) tensors; none on a CPU, which has one way only."""
    if not q.is_cuda:
        return []
    parameters = SDPAParams(q, k, v, None, 0.0, False, False)
    return [backend for backend, can_use in _CAN_USE.items() if can_use(parameters, False)]


def fastest(q: Tensor, k: Tensor, v: Tensor) -> list[SDPBackend]:
    """The fastest backend for these tensors, as `sdpa_kernel` takes it; empty where PyTorch shall choose."""

    def with_backend(backend: SDPBackend) -> Call:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        return call

    found = backends_for(q, k, v)
    return sorted(found, key=lambda backend: time_cuda(with_backend(backend), seconds=0.02).median)[:1]


def attend(q: Tensor, k: Tensor, v: Tensor, backends: list[SDPBackend]) -> Tensor:
    """Attention with the backends that `fastest` found."""
    if not backends:
        return F.scaled_dot_product_attention(q, k, v)
    with sdpa_kernel(backends):
        return F.scaled_dot_product_attention(q, k, v)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, heads * d) to (B, heads, N, d), a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def assert_attention(out: Tensor, exact: Tensor, own: Tensor) -> None:
    """`out` errs at most twice as much from the float64 result as PyTorch's attention of the same dtype, `own`, does.

    A few units in the last place are always allowed: `own` may be exact by luck where values are few.
    """
    unit = torch.finfo(out.dtype).eps * exact.abs().max()
    allowed = 2 * (own.double() - exact).abs().max() + 4 * unit
    error = (out.double() - exact).abs().max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
