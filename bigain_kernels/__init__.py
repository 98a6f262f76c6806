"""Token compression for diffusion models: fused kernels for BiGain (CVPR 2026, arXiv 2603.12240).

The ops merge and pool the tokens of self-attention; the methods compose them into plans; `bigain_kernels.diffusers`
puts them into diffusers models. Nothing here but torch is needed at import.
"""

from . import backends
from .backends import use_backend
from .checks import max_ratio
from .methods import abm_plan, alpha_schedule, lgtm_plan, sito_plan, tome_plan
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

__version__ = "0.1.0"

__all__ = [
    "MergePlan",
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
]
