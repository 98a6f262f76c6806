from __future__ import annotations

import pytest
import torch

from bigain_kernels import reference
from bigain_kernels.plan import MergePlan
from bigain_kernels.testing import assert_is_partition
from bigain_kernels.triton_kernels.block_merge_plan import launch_block_merge_plan
from bigain_kernels.triton_kernels.merge_plan import launch_merge_plan
from tests.contract.inputs import random_match

from .inputs import candidates, on_device

launch_block_merge_plan = on_device(launch_block_merge_plan)
launch_merge_plan = on_device(launch_merge_plan)

# Rows in registers and in scratch memory, counted in both ways, by one program and by several.
CONFIGS = [
    *({**config, "HISTOGRAM": histogram} for config in candidates("merge_plan") for histogram in (True, False)),
    {"BLOCK": 1024, "TOKENS": 128, "PARTS": 3, "HISTOGRAM": True, "num_warps": 4},
    {"BLOCK": 1024, "TOKENS": 64, "PARTS": 4, "HISTOGRAM": False, "num_warps": 4},
    {"BLOCK": 64, "TOKENS": 64, "PARTS": 5, "HISTOGRAM": True, "num_warps": 1},
    {"BLOCK": 64, "TOKENS": 32, "PARTS": 2, "HISTOGRAM": False, "num_warps": 1},
]


def assert_same_tables(tables, plan):
    for name, table in zip(("slot", "offsets", "members", "anchor"), tables, strict=True):
        assert torch.equal(table, getattr(plan, name)), name


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_every_config_and_several_chunks(config, kind):
    inputs = random_match(2, 600, 150, 7, kind)
    tables = launch_merge_plan(*inputs, 400, config)
    assert_same_tables(tables, reference.merge_plan(*inputs, 400, (20, 30)))
    assert_is_partition(MergePlan(*tables, (20, 30), 200))


def test_too_many_tokens():
    inputs = random_match(1, 65_537, 4)
    with pytest.raises(ValueError, match="grid: got 65537 tokens, expected at most 65536"):
        launch_merge_plan(*inputs, 4)


@pytest.mark.parametrize("reduce", ["max", "sum", "mean", "min", "std"])
@pytest.mark.parametrize(
    ("grid", "stride"), [((8, 8), (2, 2)), ((7, 9), (3, 2)), ((1, 1), (2, 2)), ((4, 6), (1, 1)), ((12, 13), (2, 2))]
)
def test_block_merge_plan_in_many_chunks(grid, stride, reduce):
    generator = torch.Generator().manual_seed(2)
    n = grid[0] * grid[1]
    # Sixteenths: sums and means are exact in float32, so ties are ties. The first row is random.
    score = torch.randint(0, 40, (2, n), generator=generator) / 16
    score[0] = torch.rand(n, generator=generator)
    score[1, ::11] = torch.nan
    score[1, 3::13] = torch.inf
    for r in {0, n // 4, n // 2, n}:
        plan = reference.block_merge_plan(score, grid, stride, r, reduce)
        tables = launch_block_merge_plan(score, grid, stride, r, reduce, CONFIGS[-1])
        assert_same_tables(tables, plan)
