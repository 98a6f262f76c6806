"""Matching against its definition: every source gets the most similar destination."""

from __future__ import annotations

import pytest
import torch

import bigain_kernels as bk
from bigain_kernels.testing import assert_match_is_best
from tests.shapes import DTYPES, GRIDS, tokens

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize(("grid", "stride"), GRIDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_are_the_most_similar_destinations(grid, stride, dtype):
    x = tokens(3, grid[0] * grid[1], 7, dtype, strided=True)
    destinations = bk.select_destinations(bk.laplacian_score(x, grid), grid, stride)
    similarity, match = bk.bipartite_match(x, destinations)
    if destinations.shape[1] == 0:
        assert (similarity == -torch.inf).all()
        assert match.tolist() == [list(range(x.shape[1]))] * 3
    else:
        assert_match_is_best(x, destinations, similarity, match)


@pytest.mark.parametrize("window", [0, 1, 2, 50])
@pytest.mark.parametrize(("grid", "stride"), [((8, 10), (2, 2)), ((7, 11), (3, 2))])
def test_window_compares_only_with_near_tiles(grid, stride, window):
    x = tokens(2, grid[0] * grid[1], 6, torch.float64)
    destinations = bk.select_destinations(bk.laplacian_score(x, grid), grid, stride)
    similarity, match = bk.bipartite_match(x, destinations, window=window, grid=grid, stride=stride)
    unit = x / x.norm(dim=-1, keepdim=True)
    last = (grid[0] // stride[0] - 1, grid[1] // stride[1] - 1)

    def tile(n):
        return min(n // grid[1] // stride[0], last[0]), min(n % grid[1] // stride[1], last[1])

    for b in range(2):
        chosen = destinations[b].tolist()
        for n in set(range(x.shape[1])) - set(chosen):
            near = [d for d in chosen if max(abs(tile(n)[0] - tile(d)[0]), abs(tile(n)[1] - tile(d)[1])) <= window]
            cosine = [unit[b, n].dot(unit[b, d]).item() for d in near]
            assert match[b, n].item() == near[cosine.index(max(cosine))]
            assert similarity[b, n].item() == pytest.approx(max(cosine), abs=1e-6)
