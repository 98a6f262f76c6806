"""Properties that hold for every input: hypothesis looks for one that breaks them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bigain_kernels as bk
from bigain_kernels.testing import assert_is_partition
from tests.shapes import tokens

pytestmark = pytest.mark.usefixtures("backend")

METHODS = {
    "lgtm": bk.lgtm_plan,
    "abm": bk.abm_plan,
    "tome": bk.tome_plan,
    "tome_first": lambda *a, **k: bk.tome_plan(*a, destinations="first", **k),
    "sito": bk.sito_plan,
}
# Tokens that break arithmetic. The guarantees of a plan hold for them; only its quality does not.
POISONS = {
    "none": lambda x: x,
    "nan": lambda x: x.index_fill(1, torch.tensor([0]), torch.nan),
    "inf": lambda x: x.index_fill(1, torch.tensor([x.shape[1] // 2]), torch.inf),
    "all nan": lambda x: torch.full_like(x, torch.nan),
    "equal": lambda x: torch.ones_like(x),
    "zero": torch.zeros_like,
}


@st.composite
def cases(draw, poisons=tuple(POISONS)):
    """(x, grid, ratio, stride) with any shape, dtype and stride that the ops accept."""
    grid = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    stride = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    batch, channels = draw(st.integers(0, 4)), draw(st.integers(1, 9))
    x = tokens(batch, grid[0] * grid[1], channels, dtype, seed=draw(st.integers(0, 99)), strided=draw(st.booleans()))
    ratio = draw(st.floats(0, 1)) * bk.max_ratio(grid, stride)
    return POISONS[draw(st.sampled_from(poisons))](x), grid, ratio, stride


methods = st.sampled_from(sorted(METHODS))
finite = cases(poisons=("none", "equal", "zero"))


def same(first: bk.MergePlan, second: bk.MergePlan) -> bool:
    tables = ("slot", "offsets", "members", "anchor")
    return all(torch.equal(getattr(first, t), getattr(second, t)) for t in tables)


@given(cases(), methods)
def test_a_plan_is_a_partition(case, method):
    x, grid, ratio, stride = case
    plan = METHODS[method](x, grid, ratio, stride)
    assert_is_partition(plan)
    assert plan.num_rows == x.shape[0]
    assert plan.r <= int(x.shape[1] * ratio)
    if method != "abm":
        assert plan.r == int(x.shape[1] * ratio)
    assert (plan.sizes().sum(1) == x.shape[1]).all()
    assert (plan.sizes() >= 1).all()


@given(finite, methods, st.sampled_from(["mean", "mlerp", "prune"]))
def test_unmerge_of_merge_is_idempotent(case, method, mode):
    x, grid, ratio, stride = case
    plan = METHODS[method](x, grid, ratio, stride)
    once = bk.token_unmerge(bk.token_merge(x.double(), plan, mode=mode), plan)
    twice = bk.token_unmerge(bk.token_merge(once, plan, mode=mode), plan)
    torch.testing.assert_close(twice, once, rtol=1e-12, atol=1e-12)


@given(cases(), methods)
def test_ratio_zero_is_the_identity(case, method):
    x, grid, _, stride = case
    plan = METHODS[method](x, grid, 0.0, stride)
    assert same(plan, bk.MergePlan.identity(x.shape[0], grid))
    back = bk.token_unmerge(bk.token_merge(x, plan), plan)
    torch.testing.assert_close(back, x, rtol=0, atol=0, equal_nan=True)


@given(cases(), methods, st.randoms(use_true_random=False))
def test_permuting_the_batch_permutes_the_result(case, method, random):
    x, grid, ratio, stride = case
    order = list(range(x.shape[0]))
    random.shuffle(order)
    plan = METHODS[method](x, grid, ratio, stride)
    permuted = METHODS[method](x[order], grid, ratio, stride)
    assert torch.equal(permuted.slot, plan.slot[order])
    merged = bk.token_merge(x, plan)
    assert torch.equal(bk.token_merge(x[order], permuted).nan_to_num(7.0), merged[order].nan_to_num(7.0))


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize(("grid", "channels"), [((8, 8), 16), ((16, 24), 40), ((15, 17), 72), ((32, 32), 320)])
def test_batch_one_equals_the_row_of_batch_eight(method, grid, channels):
    x = tokens(8, grid[0] * grid[1], channels, seed=3)
    timestep = torch.arange(8) * 100
    extra = {"timestep": timestep} if method.startswith(("tome", "sito")) else {}
    whole = METHODS[method](x, grid, 0.6, **extra)
    merged = bk.token_merge(x, whole)
    for b in range(8):
        one = METHODS[method](x[b : b + 1], grid, 0.6, **{k: v[b : b + 1] for k, v in extra.items()})
        assert torch.equal(one.slot[0], whole.slot[b])
        assert torch.equal(bk.token_merge(x[b : b + 1], one)[0], merged[b])


@given(cases(), methods)
def test_global_random_state_is_untouched(case, method):
    x, grid, ratio, stride = case
    before = torch.random.get_rng_state()
    METHODS[method](x, grid, ratio, stride)
    assert torch.equal(torch.random.get_rng_state(), before)


@given(cases(), methods)
def test_same_input_same_bits(case, method):
    x, grid, ratio, stride = case
    kept = x.clone()
    plan = METHODS[method](x, grid, ratio, stride)
    assert same(plan, METHODS[method](x, grid, ratio, stride))
    for mode in ("mean", "mlerp", "prune"):
        first, second = (bk.token_merge(x, plan, mode=mode) for _ in range(2))
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(x, kept, rtol=0, atol=0, equal_nan=True)  # no op writes to its input


@pytest.mark.parametrize("method", sorted(METHODS))
def test_thread_count_does_not_change_a_bit(method):
    x, threads = tokens(2, 1024, 64, seed=5), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 8):
            torch.set_num_threads(count)
            plan = METHODS[method](x, (32, 32), 0.7)
            results.append((plan, bk.token_merge(x, plan), bk.kv_downsample(x, (32, 32), 2, 0.9)))
    finally:
        torch.set_num_threads(threads)
    for plan, merged, pooled in results[1:]:
        assert same(plan, results[0][0])
        assert torch.equal(merged, results[0][1])
        assert torch.equal(pooled, results[0][2])


@given(finite, methods, st.integers(1, 3))
def test_shared_plan_is_the_plan_of_the_mean(case, method, k):
    x, grid, ratio, stride = case
    batch = torch.cat([x * (i + 1) + i for i in range(k)])
    shared = METHODS[method](batch, grid, ratio, stride, share_plan=k)
    mean = batch.unflatten(0, (k, x.shape[0])).to(torch.promote_types(x.dtype, torch.float32)).mean(0).to(x.dtype)
    assert same(shared, METHODS[method](mean, grid, ratio, stride))
    assert shared.num_rows == x.shape[0]
    merged = bk.token_merge(batch, shared)
    for b in range(batch.shape[0]):
        row = bk.MergePlan(
            *(t[b % x.shape[0]][None] for t in (shared.slot, shared.offsets, shared.members, shared.anchor)),
            grid,
            shared.num_slots,
        )
        assert torch.equal(merged[b], bk.token_merge(batch[b : b + 1], row)[0])
        assert torch.equal(bk.token_unmerge(merged, shared)[b], bk.token_unmerge(merged[b : b + 1], row)[0])


@given(cases(), st.floats(-1, 2))
def test_downsampling_constant_tokens_changes_nothing(case, alpha):
    x, grid, _, stride = case
    factor = (min(stride[0], grid[0]), min(stride[1], grid[1]))
    constant = torch.full_like(x, 0.75).double()
    pooled = bk.kv_downsample(constant, grid, factor, alpha)
    torch.testing.assert_close(pooled, torch.full_like(pooled, 0.75), rtol=1e-12, atol=1e-12)


def test_random_destinations_depend_on_seed_timestep_and_tile_alone():
    x = tokens(4, 256, 3)
    same_step = torch.tensor([5, 5, 9, 9])
    plan = bk.tome_plan(x, (16, 16), 0.75, timestep=same_step, seed=1)
    anchors = [set(row.tolist()) for row in plan.anchor]
    assert anchors[0] == anchors[1]
    assert anchors[2] == anchors[3]
    assert anchors[0] != anchors[2]
    other = bk.tome_plan(x, (16, 16), 0.75, timestep=same_step, seed=2)
    assert set(other.anchor[0].tolist()) != anchors[0]
    # Each position of a 2 x 2 tile is drawn about equally often: 64 tiles x 200 steps, chi-square with 3 degrees.
    many = bk.tome_plan(tokens(200, 256, 2), (16, 16), 0.75, timestep=torch.arange(200))
    inside = (many.anchor // 16 % 2) * 2 + many.anchor % 16 % 2
    counts = torch.bincount(inside.flatten().long(), minlength=4).double()
    expected = counts.sum() / 4
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # p = 0.001
