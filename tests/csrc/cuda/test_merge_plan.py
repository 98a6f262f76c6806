"""The CUDA plan kernels against the reference: all tables equal, whatever the data and the order of threads."""

from __future__ import annotations

import pytest
import torch

from bigain_kernels import reference
from tests.contract.inputs import random_match

from .inputs import on_device

TABLES = ("slot", "offsets", "members", "anchor")


def assert_same_tables(tables, plan):
    for name, table in zip(TABLES, tables, strict=True):
        assert torch.equal(table.cpu(), getattr(plan, name)), name


def assert_plans_like_the_reference(ops, inputs, r):
    n = inputs[0].shape[1]
    tables = ops.ops.merge_plan(*(on_device(t, ops.device) for t in inputs), r)
    assert_same_tables(tables, reference.merge_plan(*inputs, r, (1, n)))


@pytest.mark.parametrize(("n", "d"), [(16_384, 4096), (65_536, 16_384), (65_537, 9), (70_000, 69_000)])
def test_rows_that_shared_memory_does_not_hold(cuda_ops, n, d):
    """From 65,537 tokens on, a token and its slot no longer share 32 bits."""
    assert_plans_like_the_reference(cuda_ops, random_match(2, n, d, 3, "normal"), (n - d) // 2)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0)])
def test_empty(cuda_ops, shape):
    inputs = torch.zeros(shape), torch.zeros(shape, dtype=torch.int32), torch.zeros(shape[0], 0, dtype=torch.int32)
    assert_plans_like_the_reference(cuda_ops, inputs, 0)


def test_a_bad_match_writes_nothing_outside(cuda_ops):
    """Its values are on the device and not checked: the plan means nothing, but memory stays intact."""
    similarity, match, destinations = random_match(2, 50, 10)
    match[:, ::3], match[:, 1::3] = -7, 10**9
    destinations[:, 0], destinations[:, -1] = -1, 10**9
    tables = cuda_ops.ops.merge_plan(*(t.to(cuda_ops.device) for t in (similarity, match, destinations)), 40)
    assert [tuple(t.shape) for t in tables] == [(2, 50), (2, 11), (2, 50), (2, 10)]
    for table, largest in zip(tables, (9, 50, 49, 49), strict=True):
        assert table.min() >= 0
        assert table.max() <= largest


def test_one_launch_each(cuda_ops):
    inputs = [t.to(cuda_ops.device) for t in random_match(3, 70_000, 100)]
    before = cuda_ops.launches()
    cuda_ops.ops.merge_plan(*inputs, 500)
    cuda_ops.ops.block_merge_plan(inputs[0], 700, 100, 2, 2, 300, "std")
    assert cuda_ops.launches() == before + 2


def test_bad_arguments(cuda_ops):
    similarity, match, destinations = (t.to(cuda_ops.device) for t in random_match(2, 8, 2))
    plan, block_plan = cuda_ops.ops.merge_plan, cuda_ops.ops.block_merge_plan
    for message, call in [
        ("r: got 7", lambda: plan(similarity, match, destinations, 7)),
        ("r: got -1", lambda: plan(similarity, match, destinations, -1)),
        ("r: got 1, expected 0 <= r <= 0", lambda: plan(similarity, match, destinations[:, :0], 1)),
        ("float32", lambda: plan(similarity.double(), match, destinations, 1)),
        ("int32", lambda: plan(similarity, match.long(), destinations, 1)),
        ("match: got shape", lambda: plan(similarity, match[:, 1:], destinations, 1)),
        ("destinations: got shape", lambda: plan(similarity, match, destinations[:1], 1)),
        ("grid", lambda: block_plan(similarity, 3, 3, 1, 1, 1, "max")),
        ("stride", lambda: block_plan(similarity, 2, 4, 0, 1, 1, "max")),
        ("reduce: got 'median'", lambda: block_plan(similarity, 2, 4, 2, 2, 1, "median")),
    ]:
        with pytest.raises((ValueError, RuntimeError), match=message):
            call()


@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("n", [33, 130, 4096, 4225])
def test_blocks_that_share_a_row_agree(cuda_ops, order, rows, n):
    """The emulated GPU has 8 multiprocessors: many blocks a row, two, and one. The last is shorter than the others."""
    inputs = random_match(rows, n, n // 4, 5, "ties")
    for r in (n // 3, n - n // 4):
        assert_plans_like_the_reference(cuda_ops, inputs, r)
