from __future__ import annotations

import pytest
import torch

from bigain_kernels import max_ratio, reference, use_backend
from bigain_kernels.checks import merged_count
from bigain_kernels.methods import lgtm_plan
from bigain_kernels.plan import MergePlan
from bigain_kernels.reference.lgtm_plan import share_mean
from bigain_kernels.testing import SIMILARITY_TOLERANCE, assert_is_partition
from bigain_kernels.triton_kernels.lgtm_plan import launch_lgtm_plan

from .inputs import CASES, DTYPES, IDS, odd_tokens, on_device

launch_lgtm_plan = on_device(launch_lgtm_plan)


def assert_same_or_tied(x, grid, stride, r, actual, expected):
    """The plans agree, or the float64 reference cannot tell the tokens they differ in apart.

    Scores, and similarities around the r-th, that lie within rounding of one another may be ordered either way.
    """
    if torch.equal(actual.slot, expected.slot):
        return
    values = x.double()
    score = reference.laplacian_score(values, grid)
    for row in range(x.shape[0]):
        differs = (actual.assign()[row] != expected.assign()[row]).nonzero()[:, 0]
        if not differs.numel():
            continue
        destinations = reference.select_destinations(score[row : row + 1], grid, stride)
        similarity, _ = reference.bipartite_match(values[row : row + 1], destinations)
        threshold = similarity[0].sort(descending=True).values[r - 1]
        gap = (similarity[0, differs] - threshold).abs()
        assert (gap <= SIMILARITY_TOLERANCE).all(), f"row {row}: tokens {differs.tolist()} differ and are no ties"


@pytest.mark.parametrize("share", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "grid", "stride", "channels", "strided"), CASES, ids=IDS)
def test_chain(batch, grid, stride, channels, strided, dtype, share):
    x = odd_tokens(batch * share, grid[0] * grid[1], channels, dtype, strided)
    for ratio in (0.0, 0.9 * max_ratio(grid, stride), max_ratio(grid, stride)):
        r = merged_count(ratio, grid, stride)
        tables = launch_lgtm_plan(x, grid, stride, r, share=share)
        plan = MergePlan(*tables, grid, x.shape[1] - r)
        assert_is_partition(plan)
        with use_backend("reference"):
            expected = lgtm_plan(x, grid, ratio, stride, share_plan=share)
        assert_same_or_tied(share_mean(x, share), grid, stride, r, plan, expected)


@pytest.mark.parametrize("window", [0, 1])
def test_chain_with_a_window(window):
    x = odd_tokens(2, 99, 72, torch.float32, strided=True)
    tables = launch_lgtm_plan(x, (9, 11), (2, 2), 50, window)
    with use_backend("reference"):
        expected = lgtm_plan(x, (9, 11), 50.5 / 99, (2, 2), window=window)
    for table, name in zip(tables, ("slot", "offsets", "members", "anchor"), strict=True):
        assert torch.equal(table, getattr(expected, name)), name


@pytest.mark.parametrize("value", [0.25, 0.0])
def test_equal_tokens(value):
    x = torch.full((1, 64, 64), value)
    tables = launch_lgtm_plan(x, (8, 8), (2, 2), 40)
    with use_backend("reference"):
        expected = lgtm_plan(x, (8, 8), 40.5 / 64)
    assert torch.equal(tables[0], expected.slot)
