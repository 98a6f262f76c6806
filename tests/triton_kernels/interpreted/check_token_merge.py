from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from bigain_kernels import reference
from bigain_kernels.declaration import tables_of
from bigain_kernels.plan import MergePlan
from bigain_kernels.reference.merge_plan import plan_from_assignment
from bigain_kernels.testing import assert_close
from bigain_kernels.triton_kernels.token_merge import far_slots, launch_token_merge
from bigain_kernels.triton_kernels.token_merge_norm import launch_token_merge_norm
from bigain_kernels.triton_kernels.token_unmerge import launch_token_unmerge
from tests.contract.inputs import odd_tokens, random_match

from .inputs import DTYPES, ON_GPU, candidates, on_device

launch_token_merge = on_device(launch_token_merge)
launch_token_merge_norm = on_device(launch_token_merge_norm)
launch_token_unmerge = on_device(launch_token_unmerge)


def random_plan(rows, n, seed=0):
    d = max(n // 4, 1)
    return reference.merge_plan(*random_match(rows, n, d, seed), (n - d) * 3 // 4, (1, n))


def merge(x, plan, *args, **kwargs):
    return launch_token_merge(x, *tables_of(plan), *args, **kwargs)


def merge_norm(x, plan, **kwargs):
    return launch_token_merge_norm(x, *tables_of(plan), **kwargs)


def one_slot(n, extra=3):
    """A plan whose first slot has all tokens but the last few."""
    similarity = torch.zeros(1, n)
    similarity[:, -extra:] = -1
    destinations = torch.zeros(1, 1, dtype=torch.int32)
    match = torch.zeros(1, n, dtype=torch.int32)
    return reference.merge_plan(similarity, match, destinations, n - 1 - extra, (1, n))


def plan_of_sizes(sizes, seed=0):
    """A plan of one row whose slots, in a random order of their members, have these sizes."""
    n = sum(sizes)
    slot = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    slot = slot[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]
    first = torch.stack([(slot == i).nonzero()[0, 0] for i in range(len(sizes))])
    return plan_from_assignment(first[slot][None], len(sizes), (1, n))


HUGE_SIZES = [
    [3000, 1, 2],  # three reads of 1,024 members
    [1] * 5 + [255, 256, 257, 33, 1023, 1024, 1025],
    [256, 256, 256, 256],  # every boundary on a position
    [255, 255, 255, 255, 1],  # no huge slot, every position inside one of 255
    [1, 256, 255, 256],
    [4090, 300, 5, 4200],  # past the positions of the first group
]


@pytest.mark.parametrize("mode", ["mean", "mlerp"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sizes", HUGE_SIZES, ids=str)
def test_huge_slots(sizes, weighted, mode):
    plan = plan_of_sizes(sizes)
    assert sorted(plan.sizes()[0].tolist()) == sorted(sizes)
    x = odd_tokens(2, plan.num_tokens, 24, torch.float32).nan_to_num(1.0, 1.0)
    weights = torch.rand(2, plan.num_tokens, generator=torch.Generator().manual_seed(0)) + 0.5 if weighted else None
    expected = reference.token_merge(x.double(), plan, mode, None if weights is None else weights.double())
    assert_close(merge(x, plan, mode, weights), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["mean", "mlerp"])
def test_huge_slots_of_several_plans(dtype, mode):
    """Rows with huge slots in other places, NaN and infinite members, channels that fill no block, real strides."""
    plans = [plan_of_sizes(sizes, seed) for seed, sizes in enumerate([[600, 2, 90], [1, 690, 1], [300, 300, 92]])]
    tables = [torch.cat([getattr(plan, name) for plan in plans]) for name in ("slot", "offsets", "members", "anchor")]
    plan = MergePlan(*tables, (1, 692), 3)
    x = odd_tokens(6, 692, 72, dtype, strided=True)
    y = merge(x, plan, mode)
    assert_close(y, reference.token_merge(x.double(), plan, mode))
    for row in range(6):
        own = MergePlan(*(table[row % 3 : row % 3 + 1] for table in tables), (1, 692), 3)
        torch.testing.assert_close(merge(x[row : row + 1], own, mode)[0], y[row], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("modulate", [False, True])
def test_fused_layer_norm_of_huge_slots(modulate):
    plan, channels = plan_of_sizes([900, 3, 300]), 40
    x = odd_tokens(2, plan.num_tokens, channels, torch.float32).nan_to_num(1.0, 1.0, 1.0)
    weight, bias, shift, scale = odd_tokens(4, 2, channels, torch.float32)
    normed = F.layer_norm(x.double(), (channels,), weight[0].double(), bias[0].double(), eps=1e-6)
    if modulate:
        normed = normed * (1 + scale.double()[:, None]) + shift.double()[:, None]
    y = merge_norm(
        x, plan, norm_eps=1e-6, norm_weight=weight[0], norm_bias=bias[0],
        **({"shift": shift, "scale": scale} if modulate else {}),
    )  # fmt: skip
    assert_close(y, reference.token_merge(normed, plan))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_config_gives_the_same_bits(dtype):
    x = odd_tokens(1, 400, 72, dtype)
    for plan in (one_slot(400), one_slot(400, extra=300), random_plan(1, 400)):
        for mode in ("mean", "mlerp", "prune"):
            results = [merge(x, plan, mode, config=config) for config in candidates("token_merge")]
            for result in results[1:]:
                torch.testing.assert_close(result, results[0], rtol=0, atol=0, equal_nan=True)
        y = odd_tokens(1, plan.num_slots, 72, dtype)
        results = [launch_token_unmerge(y, *tables_of(plan), x, config=c) for c in candidates("token_unmerge")]
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("given", ["norm_weight", "norm_bias", "shift", "scale"])
def test_half_a_pair_is_refused(given):
    x, plan = odd_tokens(1, 9, 64, torch.float32), random_plan(1, 9)
    with pytest.raises(ValueError, match=f"got None, expected a tensor, as {given} is one"):
        merge_norm(x, plan, **{given: x[:, 0]})


@triton.jit
def far_kernel(p_out, num_slots, BLOCK_M: tl.constexpr):
    i_m = tl.program_id(0)
    tl.store(p_out + i_m * BLOCK_M + tl.arange(0, BLOCK_M), far_slots(i_m, num_slots, BLOCK_M))


def blocks_of(num_slots):
    """The program of each slot that merges it when it is long, of blocks of 16 slots."""
    blocks = -(-num_slots // 16)
    far = torch.zeros(16 * blocks, dtype=torch.int32)
    far_kernel[(blocks,)](far, num_slots, BLOCK_M=16)
    own = {slot: i // 16 for i, slot in enumerate(far.tolist()) if slot < num_slots}
    assert len(own) == sum(slot < num_slots for slot in far.tolist()), "a slot has two programs"
    assert set(own) == set(range(num_slots))
    return own


@pytest.mark.skipif(ON_GPU, reason="writes to a tensor of the CPU")
@pytest.mark.parametrize("num_slots", [1, 15, 16, 17, 308, 1229, 2765])
def test_long_slots_are_spread_over_programs(num_slots):
    own, blocks = blocks_of(num_slots), -(-num_slots // 16)

    def most(slots):
        """In one program, above what is fair."""
        return max(Counter(own[slot] for slot in slots).values()) - -(-len(slots) // blocks)

    for run in (16, blocks):
        assert all(most(range(at, min(at + run, num_slots))) <= 1 for at in range(0, num_slots, 7))
    if blocks >= 16:
        columns = sorted(most(range(0, num_slots, period)) for period in range(2, 2 * blocks))
        assert columns[-1] <= 6, "a column comes together"
        assert columns[-3] <= 3, "columns come together"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_many_long_slots(dtype, weighted):
    """Side by side and alone, at both ends, at the limits of what is short and huge."""
    plan = plan_of_sizes([33, 40, 1, 64, 32, 65, 40, 40, 2, 255, 40, 8, 1, 1, 1, 34, 40, 3, 100])
    x = odd_tokens(2, plan.num_tokens, 72, dtype)
    weights = torch.rand(2, plan.num_tokens, generator=torch.Generator().manual_seed(1)) + 0.1 if weighted else None
    for mode in ("mean", "mlerp"):
        y = merge(x, plan, mode, weights)
        expected = reference.token_merge(x.double(), plan, mode, None if weights is None else weights.double())
        assert_close(y, expected)
