"""lgtm_plan: the chain in one call, against the single ops of the same backend and against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from bigain_kernels import reference
from bigain_kernels.testing import SIMILARITY_TOLERANCE, assert_is_partition, unit_tokens
from bigain_kernels.tokens import share_mean

from ..shapes import GRIDS, tokens
from .inputs import CASES, IDS, assert_same_plan, odd_tokens

OP = "lgtm_plan"
LARGE_TILES = [((20, 23), (9, 10)), ((3, 40), (3, 33)), ((3, 5), (2**40, 2**40))]


def merged(grid, stride, fraction=0.8):
    """So many of the sources of a grid: a few are left for the selection to choose from."""
    d = (grid[0] // stride[0]) * (grid[1] // stride[1])
    return int(fraction * (grid[0] * grid[1] - d)) if d else 0


def chained(backend, x, grid, stride, r, window=None):
    """The plan made by the single ops."""
    destinations = backend.select_destinations(backend.laplacian_score(x, grid), grid, stride)
    similarity, match = backend.bipartite_match(x, destinations, window, grid, stride)
    return backend.merge_plan(similarity, match, destinations, r, grid)


def assert_same_or_tied(x, grid, stride, r, actual, expected):
    """The plans agree, or the float64 reference cannot tell the tokens they differ in apart.

    A token that merges in both plans may go to another destination that is as similar within rounding; one that merges
    in one plan alone must have a similarity within rounding of the r-th.
    """
    values, unit = x.double(), unit_tokens(x)
    score = reference.laplacian_score(values, grid)
    for row in range(x.shape[0]):
        found, wanted = actual.assign()[row], expected.assign()[row]
        differs = (found != wanted).nonzero()[:, 0]
        if not differs.numel():
            continue
        destinations = reference.select_destinations(score[row : row + 1], grid, stride)
        similarity = reference.bipartite_match(values[row : row + 1], destinations)[0][0]
        threshold = similarity.sort(descending=True).values[r - 1]
        cosines = [(unit[row] * unit[row, chosen]).sum(-1) for chosen in (found, wanted)]
        both = (found != torch.arange(len(found))) & (wanted != torch.arange(len(found)))
        gap = torch.where(both, cosines[0] - cosines[1], similarity - threshold).abs()
        tied = (gap <= SIMILARITY_TOLERANCE) | (~both & (similarity == threshold))
        assert tied[differs].all(), f"row {row}: tokens {differs.tolist()} differ and are no ties"


@pytest.mark.parametrize("fraction", [0.0, 1.0])
@pytest.mark.parametrize(("batch", "grid", "stride", "channels", "strided"), CASES[:4], ids=IDS[:4])
@pytest.mark.dtypes(torch.float32)
def test_all_or_nothing_merges(backend, dtype, batch, grid, stride, channels, strided, fraction):
    x, r = odd_tokens(batch, grid[0] * grid[1], channels, dtype, strided), merged(grid, stride, fraction)
    plan = backend.lgtm_plan(x, grid, stride, r)
    assert_is_partition(plan)
    assert_same_or_tied(x, grid, stride, r, plan, reference.lgtm_plan(x.double(), grid, stride, r))


@pytest.mark.parametrize(("batch", "grid", "stride", "channels", "strided"), CASES, ids=IDS)
def test_shapes(backend, dtype, batch, grid, stride, channels, strided):
    """Zero, NaN and infinite tokens are among them."""
    x, r = odd_tokens(batch, grid[0] * grid[1], channels, dtype, strided), merged(grid, stride, 0.9)
    plan = backend.lgtm_plan(x, grid, stride, r)
    assert_is_partition(plan)
    assert_same_or_tied(x, grid, stride, r, plan, reference.lgtm_plan(x.double(), grid, stride, r))


@pytest.mark.parametrize("window", [None, 1])
@pytest.mark.parametrize(("grid", "stride"), [*GRIDS, *LARGE_TILES])
@pytest.mark.dtypes(torch.float32, torch.bfloat16)
def test_one_call_is_the_chain_of_ops(backend, dtype, grid, stride, window):
    """Bit for bit: the fused pass sums as the single ones do."""
    x, r = odd_tokens(1, grid[0] * grid[1], 7, dtype, strided=True), merged(grid, stride)
    plan = backend.lgtm_plan(x, grid, stride, r, window)
    assert_same_plan(plan, chained(backend, x, grid, stride, r, window))


@pytest.mark.parametrize(("grid", "stride"), [((7, 9), (2, 2)), ((6, 11), (2, 3)), LARGE_TILES[1]])
def test_ties(backend, dtype, grid, stride):
    """Few different tokens: scores and similarities are equal all over, and order decides nothing."""
    x = tokens(3, grid[0] * grid[1], 2, seed=4).mul(0.6).round().clamp(-1, 1).to(dtype)
    r = merged(grid, stride)
    expected = chained(backend, x, grid, stride, r)
    for _ in backend.orders():
        assert_same_plan(backend.lgtm_plan(x, grid, stride, r), expected)


@pytest.mark.parametrize("r", [50, 150])
def test_exact_ties_go_to_the_lowest_token(backend, r):
    """Tokens of 16 signs: scores, norms and similarities are exact, and most of them tie."""
    generator = torch.Generator().manual_seed(5)
    few = torch.randint(0, 2, (5, 16), generator=generator) * 2.0 - 1
    x = few[torch.randint(0, 5, (2, 14 * 18), generator=generator)]
    expected = reference.lgtm_plan(x.double(), (14, 18), (2, 2), r)
    assert_same_plan(backend.lgtm_plan(x, (14, 18), (2, 2), r), expected)


@pytest.mark.parametrize("value", [0.25, 0.0])
def test_equal_tokens(backend, value):
    x = torch.full((1, 64, 64), value)
    expected = reference.lgtm_plan(x.double(), (8, 8), (2, 2), 40)
    assert_same_plan(backend.lgtm_plan(x, (8, 8), (2, 2), 40), expected)


@pytest.mark.parametrize("window", [0, 1])
def test_window(backend, window):
    x = odd_tokens(2, 99, 72, torch.float32, strided=True)
    expected = reference.lgtm_plan(x.double(), (9, 11), (2, 2), 50, window)
    assert_same_plan(backend.lgtm_plan(x, (9, 11), (2, 2), 50, window), expected)


@pytest.mark.parametrize("share", [2, 6])
@pytest.mark.parametrize("channels", [67, 72])
def test_shared_plans(backend, dtype, channels, share):
    """The plan of the mean, which is rounded to the dtype."""
    x = tokens(6, 63, channels, dtype)
    plan = backend.lgtm_plan(x, (7, 9), (2, 2), 30, None, share)
    assert plan.num_rows == 6 // share
    mean = share_mean(x, share)
    assert_same_or_tied(mean, (7, 9), (2, 2), 30, plan, reference.lgtm_plan(mean.double(), (7, 9), (2, 2), 30))


def test_shared_plans_of_large_tiles(backend):
    x = tokens(4, 300, 8)
    mean, grid, stride = share_mean(x, 2), (10, 30), (10, 27)
    expected = reference.lgtm_plan(mean.double(), grid, stride, 200)
    assert_same_or_tied(mean, grid, stride, 200, backend.lgtm_plan(x, grid, stride, 200, None, 2), expected)


@pytest.mark.dtypes(torch.bfloat16, torch.float32)
def test_a_row_does_not_depend_on_the_others(backend, dtype):
    x = tokens(3, 120, 72, dtype)
    whole, alone = backend.lgtm_plan(x, (10, 12), (2, 2), 70), backend.lgtm_plan(x[2:], (10, 12), (2, 2), 70)
    for table in ("slot", "offsets", "members", "anchor"):
        assert torch.equal(getattr(whole, table)[2:], getattr(alone, table))


def test_empty_batch(backend):
    plan = backend.lgtm_plan(torch.zeros(0, 48, 8), (6, 8), (2, 2), 20)
    tables = (plan.slot, plan.offsets, plan.members, plan.anchor)
    assert [tuple(table.shape) for table in tables] == [(0, 48), (0, 29), (0, 48), (0, 28)]
