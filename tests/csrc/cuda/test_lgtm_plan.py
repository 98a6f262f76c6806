"""lgtm_plan of the CUDA library: the chain in one call against the reference and against its own single ops."""

from __future__ import annotations

import pytest
import torch

import bigain_kernels as bk
from bigain_kernels import reference
from bigain_kernels.reference.lgtm_plan import share_mean
from bigain_kernels.testing import assert_is_partition
from tests.shapes import DTYPES, GRIDS, tokens

pytestmark = pytest.mark.usefixtures("on_cuda")
FLOATS = [dtype for dtype in DTYPES if dtype != torch.float64]
TABLES = ("slot", "offsets", "members", "anchor")
LARGE_TILES = [((20, 23), (9, 10)), ((3, 40), (3, 33))]


def assert_same(actual, expected):
    for table in TABLES:
        assert torch.equal(getattr(actual, table), getattr(expected, table).to(actual.slot.device)), table


def merged(grid, stride):
    """Most sources of a grid: a few are left for the selection to choose from."""
    d = (grid[0] // stride[0]) * (grid[1] // stride[1])
    return int(0.8 * (grid[0] * grid[1] - d)) if d else 0


def chained(x, grid, stride, r, window):
    """The plan made by the single ops."""
    destinations = bk.select_destinations(bk.laplacian_score(x, grid), grid, stride)
    similarity, match = bk.bipartite_match(x, destinations, window, grid, stride)
    return bk.merge_plan(similarity, match, destinations, r, grid)


def plan_of(x, grid, stride, r, window=None, share=1):
    tables = torch.ops.bigain.lgtm_plan(x, *grid, *stride, r, -1 if window is None else window, share)
    return bk.MergePlan(*tables, grid, x.shape[1] - r)


@pytest.mark.parametrize("window", [None, 1])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("channels", [7, 72])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("grid", "stride"), [*GRIDS, *LARGE_TILES])
def test_one_call_is_the_chain_of_ops(on_cuda, grid, stride, dtype, channels, strided, window):
    """Bit for bit: the fused pass sums as the single ones do. Zero, NaN and infinite tokens are among them."""
    x = tokens(3, grid[0] * grid[1], channels, dtype, seed=channels, strided=strided).to(on_cuda.device)
    x[0, 0], x[1, -1], x[2, x.shape[1] // 2] = 0, torch.nan, torch.inf
    r = merged(grid, stride)
    actual = plan_of(x, grid, stride, r, window)
    assert_is_partition(actual)
    assert_same(actual, chained(x, grid, stride, r, window))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("grid", "stride"), [*GRIDS, *LARGE_TILES])
def test_ties(on_cuda, order, grid, stride, dtype):
    """Few different tokens: scores and similarities are equal all over, and order decides nothing."""
    x = tokens(3, grid[0] * grid[1], 2, seed=4).mul(0.6).round().clamp(-1, 1).to(on_cuda.device, dtype)
    r = merged(grid, stride)
    assert_same(plan_of(x, grid, stride, r), chained(x, grid, stride, r, None))
    score = reference.laplacian_score(x.double(), grid)
    destinations = reference.select_destinations(score, grid, stride)
    assert torch.equal(bk.select_destinations(bk.laplacian_score(x, grid), grid, stride), destinations)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("grid", "stride"), [*GRIDS, *LARGE_TILES])
def test_agrees_with_the_reference(on_cuda, order, grid, stride, dtype):
    """Random tokens of 72 channels have no ties that rounding could break."""
    x = tokens(3, grid[0] * grid[1], 72, dtype).to(on_cuda.device)
    r = merged(grid, stride)
    assert_same(plan_of(x, grid, stride, r), reference.lgtm_plan(x.double(), grid, stride, r))


@pytest.mark.parametrize("share", [2, 3, 6])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels", [67, 72])
def test_shared_plans(on_cuda, order, dtype, channels, share):
    """The plan of the mean, which is rounded to the dtype as the reference does it."""
    x = tokens(6, 63, channels, dtype).to(on_cuda.device)
    mean = share_mean(x, share)
    actual = plan_of(x, (7, 9), (2, 2), 30, None, share)
    assert actual.slot.shape[0] == 6 // share
    assert_same(actual, plan_of(mean, (7, 9), (2, 2), 30))
    assert_same(actual, reference.lgtm_plan(x, (7, 9), (2, 2), 30, None, share))


def test_a_row_does_not_depend_on_the_others(on_cuda):
    x = tokens(3, 120, 72, torch.bfloat16).to(on_cuda.device)
    whole, alone = plan_of(x, (10, 12), (2, 2), 70), plan_of(x[2:], (10, 12), (2, 2), 70)
    for table in TABLES:
        assert torch.equal(getattr(whole, table)[2:], getattr(alone, table))


@pytest.mark.parametrize("share", [1, 2])
def test_the_whole_of_lgtm_is_five_launches(on_cuda, share):
    x = tokens(2, 256, 64, torch.bfloat16).to(on_cuda.device)
    before = on_cuda.launches()
    plan = bk.lgtm_plan(x, (16, 16), 0.7, share_plan=share)
    assert on_cuda.launches() - before == 3
    y = bk.token_merge(x, plan)
    bk.token_unmerge(y, plan, residual=x, gate=x[:, 0])
    assert on_cuda.launches() - before == 5


def test_empty_batch(on_cuda):
    tables = on_cuda.ops.lgtm_plan(torch.zeros(0, 48, 8, device=on_cuda.device), 6, 8, 2, 2, 20, -1, 1)
    assert [tuple(table.shape) for table in tables] == [(0, 48), (0, 29), (0, 48), (0, 28)]


BAD = [
    ((6, 9, 2, 2, 20, -1, 1), "grid"),
    ((6, 8, 0, 2, 20, -1, 1), "stride"),
    ((6, 8, 2, 2, 37, -1, 1), "r: got 37, expected 0 <= r <= 36"),
    ((6, 8, 2, 2, -1, -1, 1), "r: got -1"),
    ((6, 8, 7, 2, 1, -1, 1), "r: got 1, expected 0 <= r <= 0"),
    ((6, 8, 2, 2, 20, -2, 1), "window: got -2"),
    ((6, 8, 2, 2, 20, -1, 3), "share: got 3, expected a divisor of the batch, 4"),
    ((6, 8, 2, 2, 20, -1, 0), "share: got 0"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_arguments(on_cuda, arguments, message):
    x = tokens(4, 48, 10).to(on_cuda.device)
    with pytest.raises(ValueError, match=message):
        on_cuda.ops.lgtm_plan(x, *arguments)
    with pytest.raises(ValueError, match="x: wrong dtype"):
        on_cuda.ops.lgtm_plan(x.double(), 6, 8, 2, 2, 20, -1, 1)
