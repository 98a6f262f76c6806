"""The public ops; importing this package registers them in `torch.ops.bigain`."""

from . import lgtm_plan  # noqa: F401 - imported to register
from .attention import kv_downsample_attention
from .bipartite_match import bipartite_match
from .kv_downsample import kv_downsample
from .laplacian_score import laplacian_score, select_destinations
from .merge_plan import block_merge_plan, merge_plan
from .pooled_kv_projection import pooled_kv_projection
from .token_merge import token_merge, token_unmerge

__all__ = [
    "bipartite_match",
    "block_merge_plan",
    "kv_downsample",
    "kv_downsample_attention",
    "laplacian_score",
    "merge_plan",
    "pooled_kv_projection",
    "select_destinations",
    "token_merge",
    "token_unmerge",
]
