"""The ops in plain PyTorch: the truth that every backend is tested against, and the backend that runs anywhere.

The functions take the public arguments of the ops and trust them; the public ops check them. All of them compute in
float32, or in float64 when the input is float64.
"""

from .bipartite_match import bipartite_match
from .block_merge_plan import block_merge_plan
from .kv_downsample import kv_downsample
from .kv_downsample_attention import kv_downsample_attention
from .laplacian_score import laplacian_score
from .lgtm_plan import lgtm_plan
from .merge_plan import merge_plan
from .pooled_kv_projection import pooled_kv_projection
from .select_destinations import select_destinations
from .token_merge import token_merge
from .token_merge_norm import token_merge_norm
from .token_unmerge import token_unmerge

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
    "token_merge_norm",
    "token_unmerge",
]
