"""The whole of L-GTM planning in three launches: score pass, matching, tables."""

from __future__ import annotations

from torch import Tensor

from bigain_kernels.declaration import Tables
from bigain_kernels.tokens import share_mean

from .bipartite_match import launch_bipartite_match, launch_match
from .laplacian_score import launch_laplacian_score, launch_score_and_select
from .match_near import is_near, launch_match_near
from .merge_plan import launch_merge_plan, launch_merge_plan_packed
from .select_destinations import launch_select_destinations

# The score pass that selects holds the channels of whole tiles: larger ones would leave no registers.
LARGEST_TILE = 256


def run_lgtm_plan(
    x: Tensor, grid: tuple[int, int], stride: tuple[int, int], r: int, window: int | None = None, share: int = 1
) -> Tables:
    """The plan in three launches; with large tiles, of which there are few, one op after another."""
    if stride[0] * stride[1] <= LARGEST_TILE:
        return launch_lgtm_plan(x, grid, stride, r, window, share)
    x = share_mean(x, share)
    destinations = launch_select_destinations(launch_laplacian_score(x, grid), grid, stride)
    similarity, match = launch_bipartite_match(x, destinations, window, grid, stride)
    return launch_merge_plan(similarity, match, destinations, r)


def launch_lgtm_plan(
    x: Tensor, grid: tuple[int, int], stride: tuple[int, int], r: int, window: int | None = None, share: int = 1
) -> Tables:
    """Tables (slot, offsets, members, anchor) of the plan of `methods.lgtm_plan` for x (k * P, N, C), k = share.

    The score pass also averages the rows that share, and leaves behind the norms, the destinations, the list of
    sources and the packed results at destinations; matching fills in the sources; the plan is made from the packed
    (similarity, match) words. r is at most N - D.
    """
    scored = launch_score_and_select(x, grid, stride, share)
    packed, words, sources = scored["packed"], scored["words"], scored["sources"]
    if words.shape[1] and sources.numel():
        lists = scored["mean"], scored["inverse_norm"], sources, words
        if window is not None and is_near(window, grid, stride, words.shape[1]):
            launch_match_near(*lists, None, grid[1] // stride[1], grid, stride, window, packed)
        else:
            launch_match(*lists, grid[1] // stride[1], grid, stride, window, packed)
    # Without destinations, or without sources, the score pass has left every token as its own match.
    return launch_merge_plan_packed(packed, r)
