"""The backend "cpp": the C++ library for CPU tensors."""

from __future__ import annotations

from .. import declaration, native
from .backend import Backend, Implementation
from .compositions import kv_downsample_attention, lgtm_plan, pooled_kv_projection


def _implement(op: str) -> Implementation | None:
    packet = getattr(declaration.CPP, op, None)
    return None if packet is None else packet.default


CPP = Backend(
    "cpp",
    _implement,
    devices=("cpu",),
    priority=20,
    missing=native.REASON,
    # PyTorch's attention and matrix products are compiled code already; what the library adds is the pooling.
    compositions={
        "lgtm_plan": lgtm_plan,
        "kv_downsample_attention": kv_downsample_attention,
        "pooled_kv_projection": pooled_kv_projection,
    },
)
