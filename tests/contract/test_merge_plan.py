"""merge_plan against its definition and the reference: all tables equal."""

from __future__ import annotations

import pytest
import torch

from bigain_kernels import reference
from bigain_kernels.testing import assert_is_partition

from .inputs import assert_same_plan, random_match

OP = "merge_plan"
SIZES = [(1, 0), (1, 1), (2, 1), (9, 4), (64, 16), (99, 20), (300, 1), (513, 128)]


def check(backend, inputs, r):
    grid = (1, inputs[0].shape[1])
    assert_same_plan(backend.merge_plan(*inputs, r, grid), reference.merge_plan(*inputs, r, grid))


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("n", "d"), [(1, 1), (9, 4), (40, 10), (63, 12)])
def test_definition(backend, n, d, fraction):
    """The best-matched sources merge; ties, NaN last, go to the lowest token."""
    similarity, match, destinations = random_match(2, n, d, n, "ties")
    r = int(fraction * (n - d))
    plan = backend.merge_plan(similarity, match, destinations, r, (1, n))
    assert plan.num_slots == n - r
    assert_is_partition(plan)
    value = similarity.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    for b in range(2):
        sources = [t for t in range(n) if t not in destinations[b].tolist()]
        merged = set(sorted(sources, key=lambda t: (-value[b, t].item(), t))[:r])
        assert plan.assign()[b].tolist() == [match[b, t].item() if t in merged else t for t in range(n)]


@pytest.mark.parametrize("kind", ["normal", "ties"])
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_every_r(backend, n, d, kind):
    inputs = random_match(3, n, d, n, kind)
    most = n - d if d else 0
    rs = sorted({0, 1, most // 3, most - 1, most} & set(range(most + 1)))
    for i, _ in enumerate(backend.orders()):
        for r in rs if i == 0 else rs[-1:]:
            check(backend, inputs, r)


@pytest.mark.parametrize(("n", "d"), [(2049, 512), (4096, 1024), (9216, 2304)])
def test_many_tokens(backend, n, d):
    inputs = random_match(1, n, d, 3, "ties")
    for r in (n // 2, n - d):
        check(backend, inputs, r)


@pytest.mark.parametrize(("n", "d"), [(16_384, 4096), (65_536, 16_384)])
def test_the_largest_rows(backend, n, d):
    """At 65,536 tokens, counts and positions reach the end of 16 bits."""
    check(backend, random_match(1, n, d, 3, "ties"), (n - d) // 2)


@pytest.mark.parametrize("n", [40, 5000, 65_536])
def test_everything_merges_into_one_token(backend, n):
    inputs = torch.zeros(1, n), torch.full((1, n), 5, dtype=torch.int32), torch.tensor([[5]]).int()
    for r in (0, n - 1):
        check(backend, inputs, r)


@pytest.mark.parametrize("value", [0.5, -torch.inf, torch.nan])
def test_all_similarities_alike(backend, value):
    similarity, match, destinations = random_match(3, 200, 50)
    check(backend, (torch.full_like(similarity, value), match, destinations), 77)


def test_strided_inputs(backend):
    similarity, match, destinations = random_match(2, 60, 15)
    wide, wide_match = torch.zeros(2, 100), torch.zeros(60, 2, dtype=torch.int32)
    wide[:, 7:67], wide_match[:] = similarity, match.T
    check(backend, (wide[:, 7:67], wide_match.T, destinations), 30)


def test_r_is_clipped_to_the_number_of_sources(backend):
    similarity, match, destinations = random_match(1, 16, 4)
    assert backend.merge_plan(similarity, match, destinations, 10**6, (4, 4)).num_slots == 4
    nothing = random_match(1, 16, 0)
    assert backend.merge_plan(*nothing, 5, (4, 4)).num_slots == 16


def test_a_plan_is_shown_in_short(backend):
    plan = backend.merge_plan(*random_match(2, 60, 15), 30, (6, 10))
    assert repr(plan) == f"MergePlan(2 rows, 60 tokens to 30 slots, grid (6, 10), {plan.slot.device})"
    shapes = torch.utils._pytree.tree_map(lambda table: table.shape, plan)
    assert repr(shapes) == "MergePlan(60 tokens to 30 slots, grid (6, 10))"


def test_empty_batch(backend):
    similarity, match = torch.zeros(0, 8), torch.zeros(0, 8, dtype=torch.int32)
    plan = backend.merge_plan(similarity, match, match[:, :2], 3, (2, 4))
    assert [tuple(t.shape) for t in (plan.slot, plan.offsets, plan.anchor)] == [(0, 8), (0, 6), (0, 5)]
