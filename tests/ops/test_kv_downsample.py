"""Downsampling against its definition, written out as loops over windows."""

from __future__ import annotations

import pytest
import torch

import bigain_kernels as bk
from bigain_kernels.testing import assert_close
from tests.shapes import DTYPES, tokens

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [-0.5, 0.0, 0.5, 0.9, 1.0, 1.3, "rows"])
@pytest.mark.parametrize(
    ("grid", "factor"), [((8, 8), 2), ((7, 9), 2), ((9, 9), 3), ((10, 13), (2, 1)), ((9, 14), 4), ((1, 8), (1, 2))]
)
def test_downsampling_blends_nearest_and_average(grid, factor, alpha, dtype):
    (height, width), (sy, sx) = grid, factor if isinstance(factor, tuple) else (factor, factor)
    x = tokens(2, height * width, 3, dtype, strided=True)
    weight = torch.tensor([0.9, -0.2]) if alpha == "rows" else alpha
    out = bk.kv_downsample(x, grid, factor, weight)
    out_y, out_x = height // sy, width // sx
    expected = torch.zeros(2, out_y * out_x, 3, dtype=torch.float64)
    for b in range(2):
        a = float(weight[b]) if alpha == "rows" else alpha
        for i in range(out_y):
            for j in range(out_x):
                row, column = int((i + 0.5) * height / out_y), int((j + 0.5) * width / out_x)
                window = [(i * sy + p) * width + j * sx + q for p in range(sy) for q in range(sx)]
                nearest, average = x[b, row * width + column].double(), x[b, window].double().mean(0)
                expected[b, i * out_x + j] = a * nearest + (1 - a) * average
    assert_close(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize(("grid", "factor"), [((4, 6), 2), ((7, 9), 2), ((9, 14), (4, 3)), ((3, 5), 1)])
def test_what_has_weight_zero_does_not_show(grid, factor, rows, dtype):
    """alpha 1 copies the nearest token whatever stands beside it; alpha 0 averages whatever the nearest token is."""
    (height, width), (sy, sx) = grid, factor if isinstance(factor, tuple) else (factor, factor)
    out_y, out_x = height // sy, width // sx
    x = tokens(3, height * width, 5, dtype, strided=True)
    row = (2 * torch.arange(out_y) + 1) * height // (2 * out_y)
    column = (2 * torch.arange(out_x) + 1) * width // (2 * out_x)
    nearest = (row[:, None] * width + column).flatten()
    inside = torch.zeros(height, width, dtype=torch.bool)
    inside[: out_y * sy, : out_x * sx] = True

    alone = torch.full_like(x, torch.inf).index_copy(1, nearest, x[:, nearest])
    picked = bk.kv_downsample(alone, grid, factor, torch.tensor([1.0, 0.3, 1.0]) if rows else 1.0)
    for b in (0, 2) if rows else (0, 1, 2):
        assert torch.equal(picked[b], x[b, nearest])

    windows = x.masked_fill(~inside.flatten()[:, None], torch.nan)
    averaged = bk.kv_downsample(windows, grid, factor, torch.tensor([0.0, 0.3, 0.0]) if rows else 0.0)
    image = x.double().unflatten(1, grid)[:, : out_y * sy, : out_x * sx]
    expected = image.reshape(3, out_y, sy, out_x, sx, 5).mean((2, 4)).flatten(1, 2)
    for b in (0, 2) if rows else (0, 1, 2):
        assert_close(averaged[b], expected[b])


def test_downsampling_several_tensors_is_the_same_as_one_by_one():
    k, v = tokens(2, 24, 3), tokens(2, 24, 5, seed=1)
    pooled = bk.kv_downsample((k, v), (4, 6), 2, 0.9)
    assert torch.equal(pooled[0], bk.kv_downsample(k, (4, 6), 2, 0.9))
    assert torch.equal(pooled[1], bk.kv_downsample(v, (4, 6), 2, 0.9))


def test_pooling_commutes_with_a_linear_layer():
    layer, x = torch.nn.Linear(6, 4).double(), tokens(2, 24, 6, torch.float64)
    assert_close(bk.kv_downsample(layer(x), (4, 6), 2, 1.3), layer(bk.kv_downsample(x, (4, 6), 2, 1.3)))
