"""block_merge_plan against its definition and the reference: all tables equal."""

from __future__ import annotations

import math

import pytest
import torch

from bigain_kernels import reference
from bigain_kernels.testing import assert_is_partition

from ..shapes import GRIDS, tiles_of
from .inputs import assert_same_plan

OP = "block_merge_plan"
REDUCTIONS = ["max", "sum", "mean", "min", "std"]
RULES = {
    "max": max,
    "min": min,
    "sum": sum,
    "mean": lambda v: sum(v) / len(v),
    "std": lambda v: math.sqrt(sum((a - sum(v) / len(v)) ** 2 for a in v) / len(v)),
}


@pytest.mark.parametrize(("fraction", "reduce"), [(0.0, "max"), (1.0, "max"), *((0.4, each) for each in REDUCTIONS)])
@pytest.mark.parametrize(("grid", "stride"), [g for g in GRIDS if g[0] != (16, 16)])
def test_definition(backend, grid, stride, fraction, reduce):
    """The smoothest tiles merge whole."""
    n = grid[0] * grid[1]
    score = torch.rand(1, n, generator=torch.Generator().manual_seed(2))
    r = int(fraction * n)
    plan = backend.block_merge_plan(score, grid, stride, r, reduce)
    assert_is_partition(plan)
    tiles = list(tiles_of(grid, stride))
    count = r // (stride[0] * stride[1] - 1) if stride != (1, 1) else 0
    order = sorted(range(len(tiles)), key=lambda t: (RULES[reduce]([score[0, n].item() for n in tiles[t]]), t))
    expected = list(range(n))
    for t in order[:count]:
        for token in tiles[t]:
            expected[token] = tiles[t][0]
    assert plan.assign()[0].tolist() == expected


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize(
    ("grid", "stride"),
    [((8, 8), (2, 2)), ((7, 9), (3, 2)), ((1, 1), (2, 2)), ((4, 6), (1, 1)), ((12, 13), (2, 2)), ((3, 5), (10**9,) * 2),
     ((12, 20), (2, 3))],
)  # fmt: skip
def test_scores_of_any_kind(backend, grid, stride, reduce):
    """Sixteenths: sums and means are exact in float32, so ties are ties. The first row is random."""
    n = grid[0] * grid[1]
    generator = torch.Generator().manual_seed(2)
    score = torch.randint(0, 40, (2, n + 3), generator=generator) / 16
    score[0] = torch.rand(n + 3, generator=generator)
    score[1, ::11], score[1, 3::13] = torch.nan, torch.inf
    score = score[:, 1 : n + 1]
    for i, _ in enumerate(backend.orders()):
        for r in {0, n // 4, n} if i == 0 else {n // 4}:
            expected = reference.block_merge_plan(score, grid, stride, r, reduce)
            assert_same_plan(backend.block_merge_plan(score, grid, stride, r, reduce), expected)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("scale", [2.0**-56, 2.0**59])
def test_the_range_that_is_promised(backend, reduce, scale):
    """Deviations of 1e-18 to 1e18: powers of two change no order."""
    score = (torch.randint(0, 40, (1, 96), generator=torch.Generator().manual_seed(3)) / 16 + 1) * scale
    expected = reference.block_merge_plan(score, (8, 12), (2, 2), 36, reduce)
    assert_same_plan(backend.block_merge_plan(score, (8, 12), (2, 2), 36, reduce), expected)


def test_many_tokens(backend):
    score = torch.rand(1, 7200, generator=torch.Generator().manual_seed(2))
    expected = reference.block_merge_plan(score, (80, 90), (2, 3), 1800, "std")
    assert_same_plan(backend.block_merge_plan(score, (80, 90), (2, 3), 1800, "std"), expected)


def test_empty_batch(backend):
    assert backend.block_merge_plan(torch.zeros(0, 48), (6, 8), (2, 2), 9).slot.shape == (0, 48)
