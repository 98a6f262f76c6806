"""Registers the Triton kernels as the backend "triton" for CUDA tensors, where Triton is installed.

Neither Triton nor the kernels are imported before the first call that they run.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from .. import backends

OPS = (
    "laplacian_score",
    "select_destinations",
    "bipartite_match",
    "merge_plan",
    "block_merge_plan",
    "lgtm_plan",
    "token_merge",
    "token_merge_norm",
    "token_unmerge",
    "kv_downsample",
    "kv_downsample_attention",
    "pooled_kv_projection",
)


def _register(op: str) -> None:
    @backends.register(op, "triton", "cuda")
    def run(*args: Any) -> Any:
        from ..triton_kernels.registration import IMPLEMENTATIONS

        return IMPLEMENTATIONS[op](*args)


# The kernels lie in a folder of their own, which an uninstalled copy of the sources does not map to this name.
if find_spec("triton") is not None and find_spec("bigain_kernels.triton_kernels") is not None:
    for _op in OPS:
        _register(_op)
