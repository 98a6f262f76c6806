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


NORMS = ["plain", "affine", "modulated", "both"]


def norm_operands(which, batch, channels, dtype):
    """norm_weight, norm_bias, scale and shift of a fused LayerNorm; scale and shift are slices with real strides."""
    weight, bias = tokens(2, 1, channels, dtype, seed=5)[:, 0]
    scale, shift = tokens(batch, 2, channels, dtype, seed=6, strided=True).unbind(1)
    affine = {"norm_weight": weight, "norm_bias": bias} if which in ("affine", "both") else {}
    return affine | ({"scale": scale, "shift": shift} if which in ("modulated", "both") else {})


@pytest.mark.parametrize("which", NORMS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_merge_of_normalized_tokens(which, weighted, dtype, rows):
    batch, channels, eps = 4, 5, 1e-3
    x = tokens(batch, 42, channels, dtype, strided=True)
    plan = bk.lgtm_plan(x[:rows].float(), (6, 7), 0.6)
    weights = torch.rand(batch, 42, generator=torch.Generator().manual_seed(4)) + 0.1 if weighted else None
    operands = norm_operands(which, batch, channels, dtype)
    merged = bk.token_merge(x, plan, weights=weights, norm_eps=eps, **operands)
    assert merged.dtype == dtype
    wide = {name: tensor.double() for name, tensor in operands.items()}
    expected = torch.zeros(batch, plan.num_slots, channels, dtype=torch.float64)
    for b in range(batch):
        for slot in range(plan.num_slots):
            p, total, norm = b % rows, 0.0, torch.zeros(channels, dtype=torch.float64)
            for token in plan.members[p, plan.offsets[p, slot] : plan.offsets[p, slot + 1]].tolist():
                value = x[b, token].double()
                value = value - value.sum() / channels
                value = value / (value.square().sum() / channels + eps).sqrt()
                if "norm_weight" in wide:
                    value = value * wide["norm_weight"] + wide["norm_bias"]
                if "scale" in wide:
                    value = (1 + wide["scale"][b]) * value + wide["shift"][b]
                weight = 1.0 if weights is None else weights[b, token].item()
                norm, total = norm + weight * value, total + weight
            expected[b, slot] = norm / total
    assert_close(merged, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_operands_of_a_norm_may_be_wider_than_the_tokens(dtype):
    x = tokens(2, 12, 8, dtype)
    plan = bk.lgtm_plan(x.float(), (3, 4), 0.5)
    operands = norm_operands("both", 2, 8, torch.float32)
    merged = bk.token_merge(x, plan, norm_eps=1e-5, **operands)
    wide = {name: tensor.double() for name, tensor in operands.items()}
    assert_close(merged, bk.token_merge(x.double(), plan, norm_eps=1e-5, **wide), dtype)


def test_a_norm_is_not_rounded_before_the_merge():
    """Deviations of a far-off mean survive, and the normalized 16-bit tokens have more than 16 bits."""
    x = (tokens(1, 64, 32) + 300).half()
    plan = bk.MergePlan.identity(1, (8, 8))
    assert_close(bk.token_merge(x, plan, norm_eps=0.0), bk.token_merge(x.double(), plan, norm_eps=0.0))
    whole = bk.lgtm_plan(x, (8, 8), 0.7)
    # Rounding each token first would miss the mean of a slot by up to half a unit of its members; the shift takes the
    # mean itself away, so that only the rest is left, with 11 bits of its own.
    mean = bk.token_merge(x.double(), whole, norm_eps=1e-5)
    shift = -mean[:, 0].half()
    rest = bk.token_merge(x, whole, norm_eps=1e-5, scale=torch.zeros_like(shift), shift=shift)[:, 0]
    assert_close(rest, mean[:, 0] + shift.double())
