"""token_unmerge against its definition and the float64 reference."""

from __future__ import annotations

import pytest
import torch

from bigain_kernels import reference
from bigain_kernels.testing import assert_close

from ..shapes import GRIDS, tokens
from .gradients import assert_gradients
from .inputs import assert_same_bits, layouts, odd_tokens, packed_plan, random_plan, row_of

OP = "token_unmerge"
SHAPES = [(3, 3, 63, 72, True), (4, 2, 64, 64, False), (2, 1, 40, 320, True), (1, 1, 1, 64, False), (3, 1, 9, 1, True),
          (3, 3, 25, 7, False), (1, 1, 9, 1152, False)]  # fmt: skip
IDS = [f"B{b}-P{p}-N{n}-C{c}" for b, p, n, c, _ in SHAPES]


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_definition(backend, dtype, rows):
    plan = random_plan(rows, 20)
    y, residual, gate = tokens(4, plan.num_slots, 5, dtype), tokens(4, 20, 5, dtype, 1), tokens(4, 1, 5, dtype, 2)[:, 0]
    back = torch.stack([y[b, plan.slot[b % rows].long()] for b in range(4)])
    assert torch.equal(backend.token_unmerge(y, plan), back)
    scaled = back.double() * gate.double()[:, None]
    assert_close(backend.token_unmerge(y, plan, gate=gate), scaled)
    assert_close(backend.token_unmerge(y, plan, residual=residual, gate=gate), scaled + residual.double())


@pytest.mark.parametrize("gated", [None, "same", "float32"])
@pytest.mark.parametrize("added", [None, "same", "float32"])
@pytest.mark.parametrize(("batch", "rows", "n", "channels", "strided"), SHAPES, ids=IDS)
def test_shapes(backend, dtype, batch, rows, n, channels, strided, added, gated):
    """The same operations in float32, rounded once, whatever the dtypes of the residual and the gate."""
    plan = random_plan(rows, n)
    y = odd_tokens(batch, plan.num_slots, channels, dtype, strided)
    kinds = {None: None, "same": dtype, "float32": torch.float32}
    residual = odd_tokens(batch, n, channels, kinds[added], not strided, seed=1) if added else None
    gate = odd_tokens(1, batch, channels, kinds[gated], strided, seed=2)[0] if gated else None
    actual = backend.token_unmerge(y, plan, residual, gate)
    wide = [t if t is None else t.double() for t in (residual, gate)]
    assert_close(actual, reference.token_unmerge(y.double(), plan, *wide), dtype)
    if added is None and gated is None:
        assert_same_bits(actual, reference.token_unmerge(y, plan))


@pytest.mark.parametrize(("grid", "stride"), GRIDS)
def test_plans_of_grids(backend, grid, stride):
    n, d = grid[0] * grid[1], (grid[0] // stride[0]) * (grid[1] // stride[1])
    x = tokens(3, n, 7)
    plan = reference.lgtm_plan(x, grid, stride, int(0.9 * (n - d)) if d else 0)
    y = tokens(3, plan.num_slots, 7, seed=3)
    assert torch.equal(backend.token_unmerge(y, plan), reference.token_unmerge(y, plan))


def test_same_bits_in_any_layout_and_order(backend, dtype):
    plan = random_plan(3, 60)
    y, residual, gate = (
        tokens(3, plan.num_slots, 40, dtype),
        tokens(3, 60, 40, dtype, 1),
        tokens(3, 1, 40, dtype, 2)[:, 0],
    )
    expected = backend.token_unmerge(y, plan, residual, gate)
    for _ in backend.orders():
        assert_same_bits(backend.token_unmerge(y, plan, residual, gate), expected)
    for view in layouts(y):
        assert_same_bits(backend.token_unmerge(view, plan, residual, gate), expected)
    for view in layouts(residual):
        assert_same_bits(backend.token_unmerge(y, plan, view, gate), expected)
    for view in layouts(gate):
        assert_same_bits(backend.token_unmerge(y, plan, residual, view), expected)
    assert_same_bits(backend.token_unmerge(y[1:2], row_of(plan, 1), residual[1:2], gate[1:2]), expected[1:2])


@pytest.mark.parametrize(("batch", "channels"), [(0, 10), (4, 0)])
def test_nothing_to_copy(backend, batch, channels):
    plan = random_plan(2, 48) if batch else row_of(random_plan(2, 48), 2)
    y, x = torch.zeros(batch, plan.num_slots, channels), torch.zeros(batch, 48, channels)
    assert backend.token_unmerge(y, plan, residual=x).shape == x.shape


@pytest.mark.parametrize("operands", [(), ("gate",), ("residual",), ("residual", "gate")])
def test_gradients(backend, dtype, operands):
    if not backend.implements("token_merge"):
        pytest.skip(f"the gradient of unmerging is a merge, which {backend.name} does not implement")
    plan = random_plan(2, 20)
    others = {"residual": tokens(4, 20, 7, dtype, 1), "gate": tokens(4, 1, 7, dtype, 2)[:, 0]}
    inputs = {"y": tokens(4, plan.num_slots, 7, dtype, strided=True)} | {name: others[name] for name in operands}
    assert_gradients(backend, OP, lambda op, y, **given: op(y, plan, **given), inputs)


def test_packed_sequences(backend, dtype):
    given, packed = packed_plan(dtype)
    y = tokens(1, packed.plan.num_slots, given.x.shape[1], dtype)
    whole = backend.token_unmerge(y, packed.plan, given.x[None])
    for s, ((begin, end), (first, last)) in enumerate(
        zip(pairs(given.cu_seqlens), pairs(packed.cu_seqlens), strict=True)
    ):
        front, image, behind = given.parts()[s]
        parts = y[:, first:last].split([len(front), last - first - len(front) - len(behind), len(behind)], dim=1)
        middle = parts[1] if given.grids[s] is None else reference.token_unmerge(parts[1], random_plan(1, len(image)))
        expected = torch.cat([parts[0], middle, parts[2]], 1).double() + given.x[begin:end].double()
        assert_close(whole[:, begin:end], expected)


def pairs(table):
    return zip(table.tolist(), table.tolist()[1:], strict=False)
