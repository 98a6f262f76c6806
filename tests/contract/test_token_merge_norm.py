"""token_merge with a LayerNorm in front of it, against its definition and the float64 reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bigain_kernels import MergePlan, reference
from bigain_kernels.testing import assert_close

from ..shapes import tokens
from .gradients import assert_gradients
from .inputs import assert_same_bits, crowded_plan, layouts, norm_operands, positive_weights, random_plan, row_of

OP = "token_merge_norm"
GIVEN = [(), ("norm_weight", "norm_bias"), ("scale", "shift"), ("norm_weight", "norm_bias", "scale", "shift")]
GIVEN_IDS = ["plain", "affine", "modulated", "both"]
SHAPES = [(4, 2, 63, 72, True), (3, 1, 20, 7, False), (3, 3, 9, 1, False), (1, 1, 1, 64, True), (1, 1, 9, 1152, False)]


def widened(operands):
    return {name: tensor.double() for name, tensor in operands.items()}


@pytest.mark.parametrize("given", GIVEN, ids=GIVEN_IDS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
def test_definition(backend, dtype, rows, weighted, given):
    """Token by token, written out."""
    batch, n, channels, eps = 4, 20, 5, 1e-3
    x, plan = tokens(batch, n, channels, dtype, strided=True), random_plan(rows, n)
    weights = positive_weights(batch, n) if weighted else None
    operands = {name: norm_operands(batch, channels, dtype, strided=True)[name] for name in given}
    merged = backend.token_merge(x, plan, weights=weights, norm_eps=eps, **operands)
    assert merged.dtype == dtype
    wide, expected = widened(operands), torch.zeros(batch, plan.num_slots, channels, dtype=torch.float64)
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


@pytest.mark.parametrize("given", GIVEN, ids=GIVEN_IDS)
@pytest.mark.parametrize(("batch", "rows", "n", "channels", "strided"), SHAPES)
def test_shapes(backend, dtype, batch, rows, n, channels, strided, given):
    x, plan, weights = (
        tokens(batch, n, channels, dtype, strided=strided),
        random_plan(rows, n),
        positive_weights(batch, n),
    )
    operands = {name: norm_operands(batch, channels, dtype, strided)[name] for name in given}
    merged = backend.token_merge(x, plan, weights=weights, norm_eps=1e-3, **operands)
    expected = reference.token_merge(x.double(), plan, "mean", weights.double(), norm_eps=1e-3, **widened(operands))
    assert_close(merged, expected)


def test_operands_may_be_wider_or_narrower_than_the_tokens(backend, dtype):
    x, plan = tokens(2, 12, 8, dtype), random_plan(2, 12)
    for kind in {torch.float32, torch.bfloat16} - {dtype}:
        operands = norm_operands(2, 8, kind)
        for weights in (None, positive_weights(2, 12).to(kind)):
            merged = backend.token_merge(x, plan, weights=weights, norm_eps=1e-5, **operands)
            wide = None if weights is None else weights.double()
            expected = reference.token_merge(x.double(), plan, "mean", wide, norm_eps=1e-5, **widened(operands))
            assert_close(merged, expected)


@pytest.mark.dtypes(torch.float16)
def test_a_norm_is_not_rounded_before_the_merge(backend, dtype):
    """Deviations of a far-off mean survive, and the normalized 16-bit tokens have more than 16 bits."""
    x = (tokens(1, 64, 32) + 300).to(dtype)
    plan = MergePlan.identity(1, (8, 8))
    assert_close(backend.token_merge(x, plan, norm_eps=0.0), reference.token_merge(x.double(), plan, norm_eps=0.0))
    # Rounding each token first would miss the mean of a slot by up to half a unit of its members; the shift takes the
    # mean itself away, so that only the rest is left, with 11 bits of its own.
    whole = crowded_plan(1, [40], 64)
    mean = reference.token_merge(x.double(), whole, norm_eps=1e-5)
    shift = -mean[:, 0].to(dtype)
    rest = backend.token_merge(x, whole, norm_eps=1e-5, scale=torch.zeros_like(shift), shift=shift)[:, 0]
    assert_close(rest, mean[:, 0] + shift.double())


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sizes", [[31, 32, 33, 34, 65], [400, 64], [900, 3, 300]], ids=str)
def test_crowded_slots(backend, sizes, weighted, modulated):
    n = sum(sizes) + 5
    x, plan = tokens(2, n, 40), crowded_plan(2, sizes, n)
    weights = positive_weights(2, n) if weighted else None
    operands = norm_operands(2, 40, torch.float32) if modulated else {}
    merged = backend.token_merge(x, plan, weights=weights, norm_eps=1e-6, **operands)
    wide = None if weights is None else weights.double()
    assert_close(merged, reference.token_merge(x.double(), plan, "mean", wide, norm_eps=1e-6, **widened(operands)))


@pytest.mark.parametrize("channels", [72, 1152])
def test_tokens_all_alike_are_normalized_alike(backend, dtype, channels):
    """One slot of all tokens: its mean is the one normalized token."""
    x = tokens(2, 1, channels, dtype).expand(2, 100, channels)
    operands = norm_operands(2, channels, torch.float32)
    one = reference.token_merge(x[:, :1].double(), MergePlan.identity(1, (1, 1)), norm_eps=1e-5, **widened(operands))
    assert_close(backend.token_merge(x, crowded_plan(1, [100], 100), norm_eps=1e-5, **operands), one)


def test_same_bits_in_any_layout_and_order(backend, dtype):
    x, plan, operands = tokens(3, 80, 40, dtype), crowded_plan(3, [50, 9], 80), norm_operands(3, 40, dtype)
    expected = backend.token_merge(x, plan, norm_eps=1e-5, **operands)
    for _ in backend.orders():
        assert_same_bits(backend.token_merge(x, plan, norm_eps=1e-5, **operands), expected)
    for view in layouts(x):
        assert_same_bits(backend.token_merge(view, plan, norm_eps=1e-5, **operands), expected)
    for name, tensor in operands.items():
        vector = name.startswith("norm_")
        for view in layouts(tensor[None] if vector else tensor):
            changed = operands | {name: view[0] if vector else view}
            assert_same_bits(backend.token_merge(x, plan, norm_eps=1e-5, **changed), expected)
    row = {name: t if name.startswith("norm_") else t[1:2] for name, t in operands.items()}
    alone = backend.token_merge(x[1:2], row_of(plan, 1), norm_eps=1e-5, **row)
    assert_same_bits(alone, expected[1:2])


def test_nan_and_infinity_stay_in_their_slots(backend):
    x, plan = tokens(1, 64, 8), crowded_plan(1, [40, 3], 64)
    x[0, plan.members[0, -1].item()], x[0, 0, 3] = torch.nan, torch.inf
    assert_close(backend.token_merge(x, plan, norm_eps=1e-5), reference.token_merge(x.double(), plan, norm_eps=1e-5))


@pytest.mark.parametrize(("batch", "channels"), [(0, 10), (4, 0)])
def test_nothing_to_merge(backend, batch, channels):
    plan = crowded_plan(2, [9, 3], 48) if batch else row_of(crowded_plan(2, [9, 3], 48), 2)
    operands = norm_operands(batch, channels, torch.float32)
    merged = backend.token_merge(torch.zeros(batch, 48, channels), plan, norm_eps=1e-5, **operands)
    assert merged.shape == (batch, plan.num_slots, channels)


def test_is_the_merge_of_layer_norm(backend):
    """As PyTorch has it."""
    x, plan, operands = tokens(2, 20, 24), random_plan(1, 20), norm_operands(2, 24, torch.float32)
    wide = widened(operands)
    normed = F.layer_norm(x.double(), (24,), wide["norm_weight"], wide["norm_bias"], 1e-6)
    normed = normed * (1 + wide["scale"][:, None]) + wide["shift"][:, None]
    assert_close(backend.token_merge(x, plan, norm_eps=1e-6, **operands), reference.token_merge(normed, plan))


@pytest.mark.parametrize("operands", ["", "weights", "norm_weight norm_bias", "scale shift", "all"])
def test_gradients(backend, dtype, operands):
    inputs = {"x": tokens(4, 20, 7, dtype, strided=True)}
    others = {"weights": positive_weights(4, 20), **norm_operands(4, 7, dtype)}
    inputs |= {name: others[name] for name in (others if operands == "all" else operands.split())}
    plan = random_plan(2, 20)
    assert_gradients(backend, "token_merge", lambda op, x, **given: op(x, plan, norm_eps=1e-3, **given), inputs)
