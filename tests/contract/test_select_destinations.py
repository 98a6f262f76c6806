"""select_destinations against its definition and the reference: always equal."""

from __future__ import annotations

import pytest
import torch

from bigain_kernels import reference

from ..shapes import GRIDS, tiles_of, tokens

OP = "select_destinations"
LARGE_TILES = [
    ((20, 23), (9, 10)),
    ((3, 40), (3, 33)),
    ((70, 6), (65, 2)),
    ((4, 600), (2, 2)),
    ((40, 40), (20, 13)),
    ((3, 5), (10**9, 10**9)),
]


@pytest.mark.parametrize(("grid", "stride"), GRIDS)
def test_definition(backend, grid, stride):
    score = torch.rand(3, grid[0] * grid[1], generator=torch.Generator().manual_seed(1)).mul(6).round()  # many ties
    chosen = backend.select_destinations(score, grid, stride)
    for b in range(3):
        expected = sorted(min(tile, key=lambda n: (score[b, n].item(), n)) for tile in tiles_of(grid, stride))
        assert chosen[b].tolist() == expected


@pytest.mark.parametrize("kind", ["random", "ties", "infinite", "strided"])
@pytest.mark.parametrize(("grid", "stride"), [*GRIDS, *LARGE_TILES])
def test_scores_of_any_kind(backend, grid, stride, kind):
    n = grid[0] * grid[1]
    score = tokens(3, n, 1)[..., 0]
    if kind == "ties":
        score = score.round()
        score[:, ::3], score[:, 1::7] = torch.nan, -0.0
    if kind == "infinite":
        score.fill_(torch.inf)
        score[1] = torch.nan
    if kind == "strided":
        score = tokens(3, n, 2).transpose(1, 2)[:, 1]
    expected = reference.select_destinations(score, grid, stride)
    for _ in backend.orders():
        assert torch.equal(backend.select_destinations(score, grid, stride), expected)


def test_nan_scores_are_chosen_last(backend):
    score = torch.tensor([[torch.nan, 3.0, torch.nan, torch.nan, 2.0, torch.nan, torch.nan, torch.nan]])
    # Tile 0 holds tokens 0, 1, 4, 5; tile 1 holds 2, 3, 6, 7, all NaN, so its first token is taken.
    assert backend.select_destinations(score, (2, 4), (2, 2)).tolist() == [[2, 4]]


def test_empty_batch(backend):
    assert backend.select_destinations(torch.zeros(0, 48), (6, 8), (2, 2)).shape == (0, 12)
