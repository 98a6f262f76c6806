"""The functions of the published BiGain code by their names and arguments, over this package's kernels.

What the published code computes is computed, its rule for destinations and its mlerp included; what crashes there, is
never reached or needs what is not here is refused by name. Slots stand in the order of `bigain_kernels.MergePlan`, so
compare after `unmerge`. docs/migration.md has the table. New code is better off with the package itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice, check_grid, check_tensor
from ..methods import alpha_schedule
from ..ops import block_merge_plan, kv_downsample, laplacian_score
from .functions import Merge, Unmerge, bipartite_functions, do_nothing, plan_functions
from .published import pattern_destinations, published_destinations

__all__ = [
    "SpatialFilterScorer",
    "adaptive_block_pooling_random2d",
    "bipartite_soft_matching_random2d",
    "bipartite_soft_matching_with_scoring",
    "compute_dynamic_blend_factor",
    "do_nothing",
    "up_or_downsample",
]

_MODES = ("mean", "mlerp", "prune")
_AGGREGATIONS = ("sum", "max", "mean", "min", "std")
# Weight of nearest against average pooling.
_ALPHAS = {"nearest-exact": 1.0, "avg_pool": 0.0, "area": 0.0}


def _refuse(**given: Any) -> None:
    """Raise on an argument that is not at the default it stands beside, (value, default)."""
    for name, (value, default) in given.items():
        if value is not default and value != default:
            raise ValueError(f"{name}: got {value!r}, expected {default!r}: the rest is not offered here")


class SpatialFilterScorer:
    """Scores by the 3 x 3 Laplacian response.

    Args:
        method: "2d_conv"; read by nothing, as in the published code.
        norm: "l1" or "l2", over channels.
    """

    def __init__(self, method: str = "2d_conv", norm: str = "l1") -> None:
        check_choice("method", method, ("2d_conv", "2d_conv_l2"))
        check_choice("norm", norm, ("l1", "l2"))
        self.method, self.norm = method, norm

    def score_tokens(self, x: Tensor, H: int, W: int, **_: Any) -> Tensor:
        """(B, N) float32 scores of x, (B, N, C) in raster order; see `bigain_kernels.laplacian_score`."""
        return laplacian_score(x.detach(), (H, W), self.norm)

    def get_name(self) -> str:
        return f"spatial_filter_{self.method}_{self.norm}"


def bipartite_soft_matching_random2d(
    metric: Tensor,
    w: int,
    h: int,
    sx: int,
    sy: int,
    r: int,
    no_rand: bool = False,
    generator: torch.Generator | None = None,
    token_sizes: Tensor | None = None,
    token_scores: Tensor | None = None,
    locality_block_factor_h: int = 1,
    locality_block_factor_w: int = 1,
) -> tuple[Merge, Unmerge]:
    """ToMe, or with `token_scores` L-GTM under the published rule; see `published_destinations`.

    Args:
        metric: (B, N, C) tokens to compare, in raster order, N = h * w.
        w, h, sx, sy: width and height of the grid and of a tile, in tokens.
        r: how many tokens merge, at most the number of sources.
        no_rand: the top-left token of each tile instead of a random one.
        generator: needed for random destinations; the published code seeds one from torch's global state.
        token_sizes: None; sizes are `MergePlan.sizes()` here.
        token_scores: (B, N) float32; the destinations are chosen by them, and the generator is not read.
        locality_block_factor_h, locality_block_factor_w: 1; `window` of the package's methods does what they are for.

    Returns:
        (merge, unmerge): `merge(x, mode="mean")` with "mean", "mlerp" (`published_mlerp`) or "prune".

    Raises:
        TypeError, ValueError: an argument of another type, out of range, or that is not offered.
    """
    _refuse(
        token_sizes=(token_sizes, None),
        locality_block_factor_h=(locality_block_factor_h, 1),
        locality_block_factor_w=(locality_block_factor_w, 1),
    )
    if r <= 0:
        return do_nothing, do_nothing
    grid, stride = (h, w), (sy, sx)
    if token_scores is not None:
        destinations = published_destinations(token_scores, grid, stride)
    elif no_rand or generator is not None:
        destinations = pattern_destinations(metric, grid, stride, None if no_rand else generator)
    else:
        raise TypeError("generator: got None, expected a torch.Generator, or no_rand=True")
    return bipartite_functions(metric, destinations, r, grid, stride, _MODES)


def adaptive_block_pooling_random2d(
    metric: Tensor,
    w: int,
    h: int,
    sx: int,
    sy: int,
    r: int,
    no_rand: bool = False,
    generator: torch.Generator | None = None,
    token_sizes: Tensor | None = None,
    token_scores: Tensor | None = None,
    scorer: Any = None,
    tile_aggregation: str = "sum",
    use_compile: bool = False,
) -> tuple[Merge, Unmerge]:
    """ABM: the smoothest tiles merge whole, r // (sx * sy - 1) of them.

    Args:
        metric: (B, N, C) tokens, in raster order, N = h * w.
        w, h, sx, sy: width and height of the grid and of a tile, in tokens.
        r: how many tokens to remove at most.
        no_rand, generator, token_sizes, token_scores, use_compile: read by nothing, as in the published code.
        scorer: an object with `score_tokens(x, H=h, W=w)`, by default the Laplacian.
        tile_aggregation: "sum", "max", "mean", "min" or "std".

    Returns:
        (merge, unmerge), as of `bipartite_soft_matching_random2d`; "mlerp" is that of `bigain_kernels.token_merge`.

    Raises:
        TypeError, ValueError: an argument of another type or out of range.
    """
    check_choice("tile_aggregation", tile_aggregation, _AGGREGATIONS)
    tiles = (h // sy) * (w // sx) if sx > 0 and sy > 0 else 0
    r = min(r, tiles * (sx * sy - 1))
    if r <= 0:
        return do_nothing, do_nothing
    score = (scorer or SpatialFilterScorer()).score_tokens(metric, H=h, W=w)
    return plan_functions(block_merge_plan(score, (h, w), (sy, sx), r, tile_aggregation), _MODES, own_mlerp=True)


def bipartite_soft_matching_with_scoring(
    x: Tensor,
    scorer: Any,
    w: int,
    h: int,
    sx: int,
    sy: int,
    r: int,
    preserve_ratio: float = 0.3,
    score_mode: str = "high",
    preserve_spatial_uniformity: bool = False,
    if_low_frequency_dst_tokens: bool = False,
    no_rand: bool = False,
    generator: torch.Generator | None = None,
    timestep_normalized: float | None = None,
    token_sizes: Tensor | None = None,
    cache_resolution_merge: bool = False,
    merge_method: str = "bipartite",
    abp_scorer: Any = None,
    abp_tile_aggregation: str = "max",
    locality_block_factor_h: int = 1,
    locality_block_factor_w: int = 1,
    **scorer_kwargs: Any,
) -> tuple[Merge, Unmerge]:
    """L-GTM as the published scripts call it: `preserve_ratio=0` and `if_low_frequency_dst_tokens=True`.

    Args:
        x: (B, N, C) tokens, in raster order, N = h * w.
        scorer: an object with `score_tokens(x, H=h, W=w, **scorer_kwargs)`.
        w, h, sx, sy, r, no_rand, generator: as of `bipartite_soft_matching_random2d`.
        preserve_ratio: 0, which must be said; tokens kept out of merging crash the published code on most grids.
        score_mode, preserve_spatial_uniformity, timestep_normalized: read with a `preserve_ratio` only.
        if_low_frequency_dst_tokens: destinations by score; without it plain ToMe runs.
        token_sizes, cache_resolution_merge: at their defaults.
        merge_method: "bipartite", or "abp" for ABM.
        abp_scorer, abp_tile_aggregation: of ABM.
        locality_block_factor_h, locality_block_factor_w: 1.

    Returns:
        (merge, unmerge), as of `bipartite_soft_matching_random2d`.

    Raises:
        TypeError, ValueError: an argument of another type, out of range, or that is not offered.
    """
    check_choice("merge_method", merge_method, ("bipartite", "abp"))
    if r <= 0:
        return do_nothing, do_nothing
    _refuse(preserve_ratio=(preserve_ratio, 0), cache_resolution_merge=(cache_resolution_merge, False))
    if merge_method == "abp":
        return adaptive_block_pooling_random2d(
            x, w, h, sx, sy, r, scorer=abp_scorer, tile_aggregation=abp_tile_aggregation
        )
    scores = scorer.score_tokens(x, H=h, W=w, **scorer_kwargs) if if_low_frequency_dst_tokens else None
    return bipartite_soft_matching_random2d(
        x, w, h, sx, sy, r, no_rand, generator, token_sizes, scores, locality_block_factor_h, locality_block_factor_w
    )


def compute_dynamic_blend_factor(
    timestep_value: float | None,
    enable_interpolation: bool,
    start_ratio: float,
    end_ratio: float,
    static_factor: float = 0.5,
    log_key: str | None = None,
) -> float:
    """alpha at a timestep of 0 to 999 on the line from `start_ratio` at 999 to `end_ratio` at 0.

    `static_factor` without interpolation or timestep. `log_key` is read by nothing: nothing is printed.
    """
    if not enable_interpolation or timestep_value is None:
        return static_factor
    return float(alpha_schedule((start_ratio, end_ratio), torch.tensor([float(timestep_value)])))


def up_or_downsample(
    item: Tensor,
    cur_w: int,
    cur_h: int,
    new_w: int,
    new_h: int,
    method: str,
    timestep: int | None = None,
    generator: torch.Generator | None = None,
    blend_factor: float | None = None,
    blend_method_1: str | None = None,
    blend_method_2: str | None = None,
) -> Tensor:
    """Keys or values of fewer tokens: IE-KVD ("linear_blend"), ToDo ("nearest-exact") or average pooling.

    Args:
        item: (B, N, C) tokens in raster order, N = cur_h * cur_w.
        cur_w, cur_h: width and height of the grid.
        new_w, new_h: those of the result. The factor is cur_h // new_h, as in the published code, and not always the
            one that these were made with: 8 // 3 is 2, but 8 // 2 is 4.
        method: "linear_blend", "nearest-exact", "avg_pool", or "area" on grids that divide.
        timestep, generator: read by methods that are not offered.
        blend_factor: weight of `blend_method_1`, by default 0.5; of linear_blend.
        blend_method_1, blend_method_2: "nearest-exact" and "avg_pool", or None; of linear_blend.

    Returns:
        (B, new_h * new_w, C).

    Raises:
        TypeError, ValueError: an argument of another type, out of range, or that is not offered; a grid that the
            factor does not give.
    """
    check_tensor("item", item, 3)
    height, width = check_grid((cur_h, cur_w), item.shape[1], "item")
    check_choice("method", method, ("linear_blend", *_ALPHAS))
    if not (0 < new_h <= height and 0 < new_w <= width):
        raise ValueError(f"new_h, new_w: got {(new_h, new_w)}, expected at least 1 and at most {(height, width)}")
    factor = (height // new_h, width // new_w)
    sizes = (height // factor[0], width // factor[1])
    if sizes != (new_h, new_w) or (method != "nearest-exact" and factor[0] != factor[1]):
        raise ValueError(f"new_h, new_w: got {(new_h, new_w)}, expected what one factor makes of {(height, width)}")
    if method == "area" and (height % new_h or width % new_w):
        raise ValueError(f"method: got 'area' from {(height, width)} to {(new_h, new_w)}, expected 'avg_pool'")
    if method == "linear_blend":
        _refuse(
            blend_method_1=(blend_method_1 or "nearest-exact", "nearest-exact"),
            blend_method_2=(blend_method_2 or "avg_pool", "avg_pool"),
        )
        alpha = 0.5 if blend_factor is None else blend_factor
    else:
        alpha = _ALPHAS[method]
    return kv_downsample(item, (height, width), factor, alpha)
