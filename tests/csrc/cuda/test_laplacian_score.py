"""laplacian_score and select_destinations of the CUDA library against the float64 reference."""

from __future__ import annotations

import pytest
import torch

import bigain_kernels as bk
from bigain_kernels import reference
from bigain_kernels.testing import assert_close
from tests.csrc.cuda.conftest import layouts
from tests.shapes import DTYPES, GRIDS, tokens

pytestmark = pytest.mark.usefixtures("on_cuda")
FLOATS = [dtype for dtype in DTYPES if dtype != torch.float64]
LARGE_TILES = [((20, 23), (9, 10)), ((3, 40), (3, 33)), ((70, 6), (65, 2))]


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("channels", [1, 7, 64, 72, 320])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("grid", "stride"), GRIDS)
def test_score(on_cuda, grid, stride, dtype, channels, strided):
    x = tokens(3, grid[0] * grid[1], channels, dtype, seed=channels, strided=strided).to(on_cuda.device)
    for norm in ("l1", "l2"):
        assert_close(
            bk.laplacian_score(x, grid, norm), reference.laplacian_score(x.double(), grid, norm), torch.float32
        )


@pytest.mark.parametrize(("grid", "stride"), [*GRIDS, *LARGE_TILES, ((4, 600), (2, 2))])
def test_destinations(on_cuda, order, grid, stride):
    score = tokens(3, grid[0] * grid[1], 1)[..., 0].to(on_cuda.device)
    ties = score.round()
    ties[:, ::3] = torch.nan
    infinite = torch.full_like(score, torch.inf)
    infinite[1] = torch.nan
    for values in (score, ties, infinite, tokens(3, grid[0] * grid[1], 2).to(on_cuda.device).transpose(1, 2)[:, 1]):
        expected = reference.select_destinations(values, grid, stride)
        assert torch.equal(bk.select_destinations(values, grid, stride), expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels", [72, 600, 601])
def test_same_bits_in_any_layout_batch_and_order(on_cuda, order, dtype, channels):
    """600 channels of any dtype are summed by a whole warp, 72 by eight lanes; 601 leave no row aligned."""
    grid = (6, 7)
    x = tokens(3, 42, channels, dtype).to(on_cuda.device)
    expected = bk.laplacian_score(x, grid)
    assert_close(expected, reference.laplacian_score(x.double(), grid), torch.float32)
    on_cuda.set_order(0)
    assert torch.equal(bk.laplacian_score(x, grid), expected)
    assert torch.equal(bk.laplacian_score(x[1:2], grid), expected[1:2])
    for view in layouts(x):
        assert torch.equal(bk.laplacian_score(view, grid), expected)
    transposed = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(bk.laplacian_score(transposed, grid), expected)


def test_one_launch_each(on_cuda):
    x = tokens(2, 64, 320).to(on_cuda.device)
    before = on_cuda.launches()
    score = bk.laplacian_score(x, (8, 8))
    bk.select_destinations(score, (8, 8), (2, 2))
    assert on_cuda.launches() - before == 2


@pytest.mark.parametrize("shape", [(0, 48, 10), (4, 48, 0)])
def test_nothing_to_sum(on_cuda, shape):
    x = torch.zeros(shape, device=on_cuda.device)
    score = torch.ops.bigain.laplacian_score(x, 6, 8, "l2")
    assert torch.equal(score, torch.zeros(shape[:2], device=on_cuda.device))
    assert bk.select_destinations(score, (6, 8), (2, 2)).shape == (shape[0], 12)


BAD = [
    (lambda x: (x.double(), 6, 8, "l1"), "x: wrong dtype, expected float16, bfloat16 or float32"),
    (lambda x: (x.int(), 6, 8, "l1"), "x: wrong dtype"),
    (lambda x: (x[0], 6, 8, "l1"), r"x: got shape \(48, 10\), expected 3 dimensions"),
    (lambda x: (x, 6, 9, "l1"), r"grid: got \(6, 9\), expected H \* W = 48"),
    (lambda x: (x, 2**62, 4, "l1"), "grid"),
    (lambda x: (x, 6, 8, "l3"), "norm: got 'l3'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_arguments(on_cuda, arguments, message):
    x = tokens(2, 48, 10).to(on_cuda.device)
    with pytest.raises(ValueError, match=message):
        on_cuda.ops.laplacian_score(*arguments(x))


@pytest.mark.parametrize("stride", [(0, 2), (2, -1)])
def test_bad_stride(on_cuda, stride):
    with pytest.raises(ValueError, match="stride"):
        on_cuda.ops.select_destinations(torch.zeros(2, 48, device=on_cuda.device), 6, 8, *stride)
    with pytest.raises(ValueError, match="score: wrong dtype"):
        on_cuda.ops.select_destinations(torch.zeros(2, 48, device=on_cuda.device).double(), 6, 8, 2, 2)


def test_tiles_beyond_the_grid_are_none(on_cuda):
    score = torch.zeros(2, 48, device=on_cuda.device)
    for stride in ((2**62, 2**62), (7, 2), (2, 9)):
        assert on_cuda.ops.select_destinations(score, 6, 8, *stride).shape == (2, 0)
