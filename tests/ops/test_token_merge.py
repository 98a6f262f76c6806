"""Merging and unmerging against their definitions, written out as loops over slots."""

from __future__ import annotations

import pytest
import torch

import bigain_kernels as bk
from bigain_kernels.testing import assert_close
from tests.shapes import DTYPES, tokens

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("mode", ["mean", "mlerp", "prune"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_merge_and_unmerge_follow_the_plan(mode, dtype, rows):
    grid = (6, 7)
    x = tokens(4, 42, 5, dtype, strided=True)
    plan = bk.lgtm_plan(x[:rows].float(), grid, 0.6)
    merged = bk.token_merge(x, plan, mode=mode)
    assert merged.dtype == dtype
    expected = torch.zeros(4, plan.num_slots, 5, dtype=torch.float64)
    for b in range(4):
        for slot in range(plan.num_slots):
            p = b % rows
            inside = plan.members[p, plan.offsets[p, slot] : plan.offsets[p, slot + 1]].long()
            value = x[b, inside].double().mean(0)
            if mode == "mlerp":
                value = value / value.norm() * x[b, inside].double().norm(dim=-1).max()
            if mode == "prune":
                value = x[b, plan.anchor[p, slot]].double()
            expected[b, slot] = value
    assert_close(merged, expected)
    residual, gate = tokens(4, 42, 5, dtype, seed=1), tokens(4, 1, 5, dtype, seed=2)[:, 0]
    y = tokens(4, plan.num_slots, 5, dtype, seed=3)
    back = torch.stack([y[b, plan.slot[b % rows].long()] for b in range(4)])
    assert torch.equal(bk.token_unmerge(y, plan), back)
    whole = back.double() * gate.double()[:, None] + residual.double()
    assert_close(bk.token_unmerge(y, plan, residual=residual, gate=gate), whole)
    assert_close(bk.token_unmerge(y, plan, gate=gate), back.double() * gate.double()[:, None])


@pytest.mark.parametrize("scale", [1.0, 1e20, 1e-25])
def test_weights_weigh_the_mean(scale):
    x, weights = tokens(2, 12, 3), torch.rand(2, 12, generator=torch.Generator().manual_seed(4)) + 0.1
    weights = weights * scale
    plan = bk.lgtm_plan(x, (3, 4), 0.5)
    merged, rescaled = (bk.token_merge(x, plan, mode=mode, weights=weights) for mode in ("mean", "mlerp"))
    for b in range(2):
        for slot in range(plan.num_slots):
            inside = plan.members[b, plan.offsets[b, slot] : plan.offsets[b, slot + 1]].long()
            w = weights[b, inside].double()[:, None]
            mean = (x[b, inside].double() * w).sum(0) / w.sum()
            assert_close(merged[b, slot], mean)
            assert_close(rescaled[b, slot], mean / mean.norm() * x[b, inside].double().norm(dim=-1).max())
