"""token_merge against its definition and the float64 reference."""

from __future__ import annotations

import pytest
import torch

from bigain_kernels import MergePlan, reference
from bigain_kernels.testing import assert_close

from ..shapes import GRIDS, tokens
from .gradients import assert_gradients
from .inputs import (
    assert_same_bits,
    crowded_plan,
    layouts,
    odd_tokens,
    packed_plan,
    positive_weights,
    random_plan,
    row_of,
)

OP = "token_merge"
MODES = ("mean", "mlerp", "prune")
# (batch, rows of the plan, tokens, channels, strided)
SHAPES = [(3, 3, 63, 72, True), (4, 2, 64, 64, False), (2, 1, 40, 320, True), (1, 1, 1, 64, False), (3, 1, 9, 1, True),
          (3, 3, 25, 7, False), (1, 1, 9, 1152, False)]  # fmt: skip
IDS = [f"B{b}-P{p}-N{n}-C{c}" for b, p, n, c, _ in SHAPES]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_definition(backend, dtype, rows, mode):
    """Slot by slot, written out."""
    x, plan = tokens(4, 20, 5, dtype, strided=True), random_plan(rows, 20)
    merged = backend.token_merge(x, plan, mode=mode)
    assert merged.dtype == dtype
    expected = torch.zeros(4, plan.num_slots, 5, dtype=torch.float64)
    for b in range(4):
        for slot in range(plan.num_slots):
            p = b % rows
            inside = plan.members[p, plan.offsets[p, slot] : plan.offsets[p, slot + 1]].long()
            value = x[b, inside].double().mean(0)
            if mode == "mlerp":
                value = value / value.norm() * x[b, inside].double().norm(dim=-1).max()
            expected[b, slot] = x[b, plan.anchor[p, slot]].double() if mode == "prune" else value
    assert_close(merged, expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("batch", "rows", "n", "channels", "strided"), SHAPES, ids=IDS)
def test_shapes(backend, dtype, batch, rows, n, channels, strided, mode):
    """Zero, NaN and infinite tokens are among them. Short slots are summed in one order everywhere: the same bits."""
    x, plan = odd_tokens(batch, n, channels, dtype, strided), random_plan(rows, n)
    merged = backend.token_merge(x, plan, mode)
    assert_close(merged, reference.token_merge(x.double(), plan, mode))
    if mode != "mlerp" and dtype != torch.float64:
        assert_same_bits(merged, reference.token_merge(x, plan, mode))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("grid", "stride"), GRIDS)
def test_plans_of_grids(backend, grid, stride, rows):
    n = grid[0] * grid[1]
    x = tokens(3, n, 7)
    d = (grid[0] // stride[0]) * (grid[1] // stride[1])
    plan = reference.lgtm_plan(x[:rows], grid, stride, int(0.9 * (n - d)) if d else 0)
    assert_close(backend.token_merge(x, plan), reference.token_merge(x.double(), plan))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["mean", "mlerp"])
def test_weights(backend, dtype, mode, kind):
    x, plan = odd_tokens(4, 63, 72, dtype), random_plan(2, 63)
    weights = positive_weights(4, 63).to(kind)
    expected = reference.token_merge(x.double(), plan, mode, weights.double())
    assert_close(backend.token_merge(x, plan, mode, weights), expected)


@pytest.mark.parametrize("mode", ["mean", "mlerp"])
@pytest.mark.parametrize("scale", [1e20, 1e-25])
def test_weights_of_any_size(backend, scale, mode):
    x, plan = tokens(2, 12, 3), random_plan(2, 12)
    weights = positive_weights(2, 12) * scale
    expected = reference.token_merge(x.double(), plan, mode, weights.double())
    assert_close(backend.token_merge(x, plan, mode, weights), expected)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mode", ["mean", "mlerp"])
@pytest.mark.parametrize("sizes", [[32, 5], [33, 34, 31], [147, 64, 65], [600, 2, 90]], ids=str)
def test_crowded_slots(backend, sizes, mode, weighted):
    """Slots of 32 and of more members take different routes; the other row of the plan has them elsewhere."""
    n = sum(sizes) + 9
    x, plan = tokens(4, n, 40), crowded_plan(2, sizes, n)
    weights = positive_weights(4, n) if weighted else None
    expected = reference.token_merge(x.double(), plan, mode, None if weights is None else weights.double())
    merged = backend.token_merge(x, plan, mode, weights)
    assert_close(merged, expected)
    for _ in backend.orders():
        own = backend.token_merge(x[3:], row_of(plan, 1), mode, None if weights is None else weights[3:])
        assert_same_bits(own, merged[3:])


@pytest.mark.parametrize("mode", MODES)
def test_same_bits_in_any_layout_and_order(backend, dtype, mode):
    x, plan = tokens(3, 60, 40, dtype), crowded_plan(3, [40, 9], 60)
    merged = backend.token_merge(x, plan, mode)
    for view in layouts(x):
        assert_same_bits(backend.token_merge(view, plan, mode), merged)
    for _ in backend.orders():
        assert_same_bits(backend.token_merge(x, plan, mode), merged)
    if mode != "prune":
        weights = positive_weights(3, 60)
        weighted = backend.token_merge(x, plan, mode, weights)
        for view in layouts(weights):
            assert_same_bits(backend.token_merge(x, plan, mode, view), weighted)


@pytest.mark.parametrize("n", [150, 1500])
@pytest.mark.dtypes(torch.bfloat16)
def test_equal_tokens_keep_their_value(backend, dtype, n):
    x, plan = torch.full((1, n, 64), 0.3, dtype=dtype), crowded_plan(1, [n - 3], n)
    assert_same_bits(backend.token_merge(x, plan), x[:, : plan.num_slots])


@pytest.mark.parametrize("mode", ["mean", "mlerp"])
def test_nan_and_infinity_stay_in_their_slots(backend, mode):
    x, plan = tokens(1, 64, 8), crowded_plan(1, [40, 3], 64)
    x[0, plan.members[0, -1].item()], x[0, 0, 3] = torch.nan, torch.inf
    assert_close(backend.token_merge(x, plan, mode), reference.token_merge(x.double(), plan, mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("batch", "channels"), [(0, 10), (4, 0)])
def test_nothing_to_merge(backend, batch, channels, mode):
    plan = crowded_plan(2, [9, 3], 48)
    if batch == 0:
        tables = (plan.slot, plan.offsets, plan.members, plan.anchor)
        plan = MergePlan(*(table[:0] for table in tables), plan.grid, plan.num_slots)
    merged = backend.token_merge(torch.zeros(batch, 48, channels), plan, mode)
    assert merged.shape == (batch, plan.num_slots, channels)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mode", ["mean", "mlerp", "prune"])
def test_gradients(backend, dtype, mode, weighted):
    if mode == "prune" and weighted:
        return
    inputs = {"x": tokens(4, 20, 7, dtype, strided=True)}
    if weighted:
        inputs["weights"] = positive_weights(4, 20).to(torch.promote_types(dtype, torch.float32))
    plan = random_plan(2, 20)
    assert_gradients(backend, OP, lambda op, x, weights=None: op(x, plan, mode, weights), inputs)


@pytest.mark.parametrize("mode", MODES)
def test_packed_sequences(backend, dtype, mode):
    """One long row; each image gets the bits that it gets by itself, and text its own."""
    given, packed = packed_plan(dtype)
    merged = backend.token_merge(given.x[None], packed.plan, mode)
    seen = 0
    for (front, image, behind), grid in zip(given.parts(), given.grids, strict=True):
        plan = random_plan(1, len(image)) if grid else None
        alone = image if plan is None else backend.token_merge(image[None], plan, mode)[0]
        for part, exact in ((front, mode != "mlerp"), (alone, True), (behind, mode != "mlerp")):
            found = merged[0, seen : seen + len(part)]
            assert_same_bits(found, part) if exact else assert_close(found, part.double())
            seen += len(part)
    assert seen == merged.shape[1]
