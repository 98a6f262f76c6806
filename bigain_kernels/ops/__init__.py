"""The public ops; importing this package registers them in `torch.ops.bigain`."""

from ..backends.registry import refuse_outdated_libraries
from . import lgtm_plan  # noqa: F401 - imported to register
from ._flops import register_formulas
from .bipartite_match import bipartite_match
from .block_merge_plan import block_merge_plan
from .kv_downsample import kv_downsample
from .kv_downsample_attention import kv_downsample_attention
from .laplacian_score import laplacian_score
from .merge_plan import merge_plan
from .pooled_kv_projection import pooled_kv_projection
from .select_destinations import select_destinations
from .token_merge import token_merge
from .token_unmerge import token_unmerge

register_formulas()
refuse_outdated_libraries()

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
