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
from .warming import WarmedUp, warm_up

if TYPE_CHECKING:
    from .methods import abm_plan, alpha_schedule, lgtm_plan, sito_plan, tome_plan

__version__ = "0.1.0"

__all__ = [
    "MergePlan",
    "WarmedUp",
    "abm_plan",
    "alpha_schedule",
    "backends",
    "bipartite_match",
    "block_merge_plan",
    "kv_downsample",
    "kv_downsample_attention",
    "laplacian_score",
    "lgtm_plan",
    "max_ratio",
    "merge_plan",
    "pooled_kv_projection",
    "select_destinations",
    "sito_plan",
    "token_merge",
    "token_unmerge",
    "tome_plan",
    "use_backend",
    "warm_up",
]

# Imported when they are asked for: with their configs they would take as long to import as all the rest.
_METHODS = ("abm_plan", "alpha_schedule", "lgtm_plan", "sito_plan", "tome_plan")


def __getattr__(name: str) -> Any:
    if name not in ("methods", *_METHODS):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    methods = import_module(f"{__name__}.methods")
    globals().update({each: getattr(methods, each) for each in _METHODS})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), "methods", *_METHODS})
