"""The ops in plain PyTorch: the truth that every backend is tested against, and the backend that runs anywhere.

The functions have the signatures of the public ops and trust their arguments; the public ops check them. All of them
compute in float32, or in float64 when the input is float64.
"""

from .attention import kv_downsample_attention
from .bipartite_match import bipartite_match
from .kv_downsample import kv_downsample
from .laplacian_score import laplacian_score, select_destinations
from .lgtm_plan import lgtm_plan
from .merge_plan import block_merge_plan, merge_plan
from .pooled_kv_projection import pooled_kv_projection
from .token_merge import token_merge, token_unmerge

__all__ = [
    "bipartite_match",
    "block_merge_plan",
    "kv_downsample",
    "kv_downsample_attention",
    "laplacian_score",
    "lgtm_plan",
    "merge_plan",
    "pooled_kv_projection",
    "select_destinations",
    "token_merge",
    "token_unmerge",
]
