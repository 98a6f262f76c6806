"""The frequency score and the destinations against their definitions, written out as loops."""

from __future__ import annotations

import pytest
import torch

import bigain_kernels as bk
from bigain_kernels.testing import assert_close
from tests.shapes import DTYPES, GRIDS, tiles_of, tokens

pytestmark = pytest.mark.usefixtures("backend")


def naive_score(x, grid, norm):
    height, width = grid
    out = torch.zeros(x.shape[:2], dtype=torch.float64)
    for b in range(x.shape[0]):
        for row in range(height):
            for column in range(width):
                response = 4 * x[b, row * width + column].double()
                for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                    if 0 <= r < height and 0 <= c < width:
                        response = response - x[b, r * width + c].double()
                out[b, row * width + column] = response.norm(p=1 if norm == "l1" else 2)
    return out


@pytest.mark.parametrize(("grid", "stride"), GRIDS)
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_score_is_the_norm_of_the_laplacian(grid, stride, norm, dtype):
    x = tokens(2, grid[0] * grid[1], 5, dtype, strided=True)
    score = bk.laplacian_score(x, grid, norm)
    assert score.dtype == torch.float32
    assert_close(score, naive_score(x, grid, norm), torch.float32)


@pytest.mark.parametrize(("grid", "stride"), GRIDS)
def test_destinations_are_the_smoothest_tokens_of_their_tiles(grid, stride):
    score = torch.rand(3, grid[0] * grid[1], generator=torch.Generator().manual_seed(1)).mul(6).round()  # many ties
    chosen = bk.select_destinations(score, grid, stride)
    for b in range(3):
        expected = sorted(min(tile, key=lambda n: (score[b, n].item(), n)) for tile in tiles_of(grid, stride))
        assert chosen[b].tolist() == expected


def test_nan_scores_are_chosen_last():
    score = torch.tensor([[torch.nan, 3.0, torch.nan, torch.nan, 2.0, torch.nan, torch.nan, torch.nan]])
    # Tile 0 holds tokens 0, 1, 4, 5; tile 1 holds 2, 3, 6, 7, all NaN, so its first token is taken.
    assert bk.select_destinations(score, (2, 4), (2, 2)).tolist() == [[2, 4]]
