"""Plans against their definitions, written out as loops over tokens and tiles."""

from __future__ import annotations

import math

import pytest
import torch

import bigain_kernels as bk
from bigain_kernels.testing import assert_is_partition
from tests.shapes import GRIDS, tiles_of, tokens

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize(("grid", "stride"), GRIDS)
@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_plan_merges_the_best_matched_sources(grid, stride, fraction):
    n = grid[0] * grid[1]
    x = tokens(2, n, 4)
    destinations = bk.select_destinations(bk.laplacian_score(x, grid), grid, stride)
    similarity, match = bk.bipartite_match(x, destinations)
    similarity = similarity.mul(4).round().div(4)  # ties
    count = n - destinations.shape[1] if destinations.shape[1] else 0
    r = int(fraction * count)
    plan = bk.merge_plan(similarity, match, destinations, r, grid)
    assert plan.num_slots == n - r
    assert_is_partition(plan)
    for b in range(2):
        sources = [t for t in range(n) if t not in destinations[b].tolist()]
        merged = set(sorted(sources, key=lambda t: (-similarity[b, t].item(), t))[:r])
        assert plan.assign()[b].tolist() == [match[b, t].item() if t in merged else t for t in range(n)]


def test_r_is_clipped_to_the_number_of_sources():
    x = tokens(1, 16, 4)
    destinations = bk.select_destinations(bk.laplacian_score(x, (4, 4)), (4, 4), (2, 2))
    similarity, match = bk.bipartite_match(x, destinations)
    assert bk.merge_plan(similarity, match, destinations, 10**6, (4, 4)).num_slots == 4
    nothing = destinations[:, :0].contiguous()
    similarity, match = bk.bipartite_match(x, nothing)
    assert bk.merge_plan(similarity, match, nothing, 5, (4, 4)).num_slots == 16


@pytest.mark.parametrize(("grid", "stride"), GRIDS)
@pytest.mark.parametrize("reduce", ["max", "sum", "mean", "min", "std"])
@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
def test_block_plan_merges_the_smoothest_tiles_whole(grid, stride, reduce, fraction):
    n = grid[0] * grid[1]
    score = torch.rand(2, n, generator=torch.Generator().manual_seed(2))
    r = int(fraction * n)
    plan = bk.block_merge_plan(score, grid, stride, r, reduce)
    assert_is_partition(plan)
    rule = {
        "max": max,
        "min": min,
        "sum": sum,
        "mean": lambda v: sum(v) / len(v),
        "std": lambda v: math.sqrt(sum((a - sum(v) / len(v)) ** 2 for a in v) / len(v)),
    }[reduce]
    for b in range(2):
        tiles = list(tiles_of(grid, stride))
        count = r // (stride[0] * stride[1] - 1) if stride != (1, 1) else 0
        order = sorted(range(len(tiles)), key=lambda t: (rule([score[b, n].item() for n in tiles[t]]), t))
        expected = list(range(n))
        for t in order[:count]:
            for token in tiles[t]:
                expected[token] = tiles[t][0]
        assert plan.assign()[b].tolist() == expected
