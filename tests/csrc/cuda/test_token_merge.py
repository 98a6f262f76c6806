"""token_merge, with a LayerNorm and without, and token_unmerge of the CUDA library against the reference."""

from __future__ import annotations

import pytest
import torch

import bigain_kernels as bk
from bigain_kernels import MergePlan, reference
from bigain_kernels.testing import assert_close
from tests.contract.inputs import crowded_plan
from tests.shapes import DTYPES, tokens

from .conftest import loads

pytestmark = pytest.mark.usefixtures("on_cuda")
FLOATS = [dtype for dtype in DTYPES if dtype != torch.float64]


def norm_operands(batch, channels, dtype, device, strided=False):
    """norm_weight, norm_bias, scale and shift of a fused LayerNorm."""
    weight, bias = tokens(2, 1, channels, dtype, seed=10)[:, 0].to(device)
    scale, shift = (tokens(batch, 1, channels, dtype, seed=seed, strided=strided).to(device) for seed in (11, 12))
    return {"norm_weight": weight, "norm_bias": bias, "scale": scale[:, 0], "shift": shift[:, 0]}


def widened(operands):
    return {name: tensor.double() for name, tensor in operands.items()}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels", [40, 67, 136])
def test_crowded_slots_of_normalized_tokens(on_cuda, order, dtype, channels):
    n, sizes = 700, [400, 8, 9, 31, 32, 33, 64, 65]
    plan = crowded_plan(2, sizes, n).to(on_cuda.device)
    x = tokens(4, n, channels, dtype).to(on_cuda.device)
    weights = (tokens(4, n, 1, seed=8)[..., 0].abs() + 0.1).to(on_cuda.device)
    operands = norm_operands(4, channels, dtype, on_cuda.device)
    for norm in ({}, operands):
        for given in (None, weights):
            merged = bk.token_merge(x, plan, weights=given, norm_eps=1e-5, **norm)
            wide = given if given is None else given.double()
            expected = reference.token_merge(x.double(), plan, "mean", wide, norm_eps=1e-5, **widened(norm))
            assert_close(merged, expected)
            on_cuda.set_order(0)
            assert torch.equal(bk.token_merge(x, plan, weights=given, norm_eps=1e-5, **norm), merged)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels", [40, 67, 136])
def test_crowded_slots(on_cuda, order, dtype, channels):
    """Slots of up to 32 members are one part; longer ones have parts of 8, or so many that there are at most 32."""
    n, sizes = 1800, [1000, 8, 9, 31, 32, 33, 64, 65, 256, 257]
    plan = crowded_plan(2, sizes, n).to(on_cuda.device)
    assert plan.sizes()[0].sort(descending=True).values[:10].tolist() == sorted(sizes, reverse=True)
    x = tokens(4, n, channels, dtype).to(on_cuda.device)
    weights = (tokens(4, n, 1, seed=8)[..., 0].abs() + 0.1).to(on_cuda.device)
    for mode in ("mean", "mlerp"):
        for given in (None, weights):
            merged = bk.token_merge(x, plan, mode=mode, weights=given)
            wide = given if given is None else given.double()
            assert_close(merged, reference.token_merge(x.double(), plan, mode, wide))
            on_cuda.set_order(0)
            assert torch.equal(bk.token_merge(x, plan, mode=mode, weights=given), merged)
            # The other row of the plan, alone.
            other = MergePlan(
                plan.slot[1:], plan.offsets[1:], plan.members[1:], plan.anchor[1:], plan.grid, plan.num_slots
            )
            alone = bk.token_merge(x[3:], other, mode=mode, weights=given if given is None else weights[3:])
            assert torch.equal(alone, merged[3:])


def test_short_slots_have_the_bits_of_the_reference(on_cuda):
    """Both add the members in ascending order in float32; so a merge is the same on every backend."""
    if not on_cuda.emulated:
        pytest.skip("the order of the reference is that of index_add_ on the CPU")
    plan = crowded_plan(3, list(range(32, 0, -1)), 600)
    x = tokens(3, 600, 40)
    assert torch.equal(bk.token_merge(x, plan), reference.token_merge(x, plan))


@pytest.mark.parametrize("sizes", [[2000], [300] * 6, [60] * 30, [9] * 200, []])
def test_members_are_shared_out_evenly_whatever_the_sizes_of_slots(on_cuda, sizes):
    """In 64 channels of float16 a thread reads one vector of a member, and no thread many more than others."""
    n = 2048
    plan = crowded_plan(1, sizes, n).to(on_cuda.device)
    x = tokens(1, n, 64, torch.float16).to(on_cuda.device)
    whole, busiest = loads(on_cuda)
    bk.token_merge(x, plan)
    whole, busiest = (after - before for after, before in zip(loads(on_cuda), (whole, busiest), strict=True))
    assert whole == 8 * n  # each member once, by eight lanes
    # A slot of up to 32 members is one thread's; the members of longer ones are shared out.
    ordered = plan.sizes()[0].tolist()
    blocks = [ordered[i : i + 32] for i in range(0, len(ordered), 32)]
    assert busiest <= sum(sum(block) / 32 + max(min(max(block), 32), max(block) / 16) for block in blocks)


def test_launches(on_cuda):
    plan = crowded_plan(2, [40, 3], 64).to(on_cuda.device)
    x = tokens(4, 64, 40, torch.float16).to(on_cuda.device)
    for mode, expected in (("mean", 1), ("prune", 1), ("mlerp", 3)):
        before = on_cuda.launches()
        y = bk.token_merge(x, plan, mode=mode)
        assert on_cuda.launches() - before == expected
    for operands in ({}, norm_operands(4, 40, torch.float16, on_cuda.device)):
        before = on_cuda.launches()
        bk.token_merge(x, plan, norm_eps=1e-5, **operands)
        assert on_cuda.launches() - before == 2
    before = on_cuda.launches()
    bk.token_unmerge(y, plan, residual=x, gate=x[:, 0].float())
    assert on_cuda.launches() - before == 1


@pytest.mark.parametrize("channels", [7, 64])
def test_tables_out_of_range_read_nothing_else(on_cuda, channels):
    """A wrong plan gives wrong numbers, made of the tokens alone: around them lies NaN."""
    around = torch.full((6, 70, channels), torch.nan, device=on_cuda.device)
    x = around[2:4, 3:67]
    x.copy_(tokens(2, 64, channels))
    plan = crowded_plan(1, [40, 3], 64)
    for value in (-1, 64, 2**31 - 1, -(2**31)):
        tables = [table.clone() for table in (plan.slot, plan.offsets, plan.members, plan.anchor)]
        for table in tables:
            table[:, 1::3] = value
        tables = [table.to(on_cuda.device) for table in tables]
        for mode in ("mean", "mlerp", "prune"):
            y = on_cuda.ops.token_merge(x, *tables, mode, None)
            assert not y.isnan().any()
        y = on_cuda.ops.token_merge_norm(x, *tables, None, 1e-5, x[0, 0], x[0, 1], x[:, 0], x[:, 1])
        assert not y.isnan().any()
        assert not on_cuda.ops.token_unmerge(y, *tables, x, None).isnan().any()


BAD = [
    ({"x": lambda t: t.double()}, "x: got float64"),
    ({"x": lambda t: t[:3]}, "x: got batch 3, expected a multiple of the plan's 2 rows"),
    ({"offsets": lambda t: t.long()}, "offsets: got int64, expected int32"),
    ({"members": lambda t: t[:, 1:]}, "members: got shape"),
    ({"anchor": lambda t: t.repeat(1, 3)}, "anchor: got .* slots, expected at most 48"),
    ({"mode": lambda t: "max"}, "mode: got 'max'"),
    ({"weights": lambda t: torch.zeros(4, 47)}, "weights: got shape"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments(on_cuda, change, message):
    plan = crowded_plan(2, [9, 3], 48).to(on_cuda.device)
    arguments = {
        "x": tokens(4, 48, 10).to(on_cuda.device),
        **{name: getattr(plan, name) for name in ("slot", "offsets", "members", "anchor")},
        "mode": "mean",
        "weights": None,
    }
    arguments = {name: change.get(name, lambda t: t)(value) for name, value in arguments.items()}
    arguments = {k: v.to(on_cuda.device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        on_cuda.ops.token_merge(**arguments)


BAD_NORMS = [
    ({"x": lambda t: t.double()}, "x: got float64"),
    ({"x": lambda t: t[:3]}, "x: got batch 3, expected a multiple of the plan's 2 rows"),
    ({"members": lambda t: t[:, 1:]}, "members: got shape"),
    ({"weights": lambda t: torch.zeros(4, 47)}, "weights: got shape"),
    ({"norm_weight": lambda t: t[1:]}, r"norm_weight: got shape \(9\), expected \(10\)"),
    ({"norm_bias": lambda t: t.double()}, "norm_bias: got float64"),
    ({"norm_bias": lambda t: None}, "norm_bias: got None, expected a tensor, as norm_weight is one"),
    ({"scale": lambda t: None}, "scale: got None, expected a tensor, as shift is one"),
    ({"scale": lambda t: t[0]}, r"scale: got shape \(10\), expected 2 dimensions"),
    ({"shift": lambda t: t[:3]}, r"shift: got shape \(3, 10\), expected \(4, 10\)"),
]


@pytest.mark.parametrize(("change", "message"), BAD_NORMS)
def test_bad_arguments_of_a_norm(on_cuda, change, message):
    plan = crowded_plan(2, [9, 3], 48).to(on_cuda.device)
    arguments = {
        "x": tokens(4, 48, 10).to(on_cuda.device),
        **{name: getattr(plan, name) for name in ("slot", "offsets", "members", "anchor")},
        "weights": None,
        "norm_eps": 1e-5,
        **norm_operands(4, 10, torch.float32, on_cuda.device),
    }
    arguments = {name: change.get(name, lambda t: t)(value) for name, value in arguments.items()}
    arguments = {k: v.to(on_cuda.device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        on_cuda.ops.token_merge_norm(**arguments)


def test_bad_arguments_of_unmerge(on_cuda):
    plan = crowded_plan(2, [9, 3], 48).to(on_cuda.device)
    tables = [plan.slot, plan.offsets, plan.members, plan.anchor]
    x, y = tokens(4, 48, 10).to(on_cuda.device), tokens(4, plan.num_slots, 10).to(on_cuda.device)
    for arguments, message in (
        ((x, *tables, None, None), "offsets: got shape"),
        ((y, *tables, x[:, 1:], None), "residual: got shape"),
        ((y, *tables, None, x[0]), "gate: got shape"),
        ((y, *tables, None, x[:, 0].double()), "gate: got float64"),
    ):
        with pytest.raises(ValueError, match=message):
            on_cuda.ops.token_unmerge(*arguments)
