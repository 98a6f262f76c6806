"""Token compression for diffusion models: fused kernels for BiGain (CVPR 2026, arXiv 2603.12240).

The ops merge and pool the tokens of self-attention; the methods compose them into plans; `bigain_kernels.diffusers`
puts them into diffusers models. Nothing here but torch is needed at import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import backends
from .backends import use_backend
from .checks import max_ratio
from .ops import (
    bipartite_match,
    block_merge_plan,
    kv_downsample,
    kv_downsample_attention,
    laplacian_score,
    merge_plan,
    pooled_kv_projection,
    select_destinations,
    token_merge,
    token_unmerge,
)
from .plan import MergePlan

if TYPE_CHECKING:
    from .methods import abm_plan, alpha_schedule, lgtm_plan, sito_plan, tome_plan
    from .varlen import PackedPlan, kv_downsample_varlen, token_merge_varlen, token_unmerge_varlen, varlen_plan
    from .warming import WarmedUp, warm_up

__version__ = "0.1.0"

__all__ = [
    "MergePlan",
    "PackedPlan",
    "WarmedUp",
    "abm_plan",
    "alpha_schedule",
    "backends",
    "bipartite_match",
    "block_merge_plan",
    "kv_downsample",
    "kv_downsample_attention",
    "kv_downsample_varlen",
    "laplacian_score",
    "lgtm_plan",
    "max_ratio",
    "merge_plan",
    "pooled_kv_projection",
    "select_destinations",
    "sito_plan",
    "token_merge",
    "token_merge_varlen",
    "token_unmerge",
    "token_unmerge_varlen",
    "tome_plan",
    "use_backend",
    "varlen_plan",
    "warm_up",
]

# Imported when they are asked for: the methods with their configs would take as long to import as all the rest.
_LATER = {
    **dict.fromkeys(("abm_plan", "alpha_schedule", "lgtm_plan", "sito_plan", "tome_plan"), "methods"),
    **dict.fromkeys(
        ("PackedPlan", "kv_downsample_varlen", "token_merge_varlen", "token_unmerge_varlen", "varlen_plan"), "varlen"
    ),
    **dict.fromkeys(("WarmedUp", "warm_up"), "warming"),
}


def __getattr__(name: str) -> Any:
    if name == "methods":
        return import_module(f"{__name__}.methods")
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), "methods", *_LATER})
