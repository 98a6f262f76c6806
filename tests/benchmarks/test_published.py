"""The published algorithms that the benchmarks time compute what the reference computes."""

from __future__ import annotations

import pytest
import torch

from benchmarks import published
from bigain_kernels import reference
from bigain_kernels.testing import assert_close
from tests.shapes import tokens

GRID, STRIDE, RATIO = (6, 8), (2, 2), 0.6


@pytest.fixture
def x():
    return tokens(2, 48, 20, torch.float64)


@pytest.mark.parametrize("contiguous", [False, True])
def test_score(x, contiguous):
    # The reference returns float32.
    score = published.laplacian_score(x, GRID, contiguous).float()
    assert_close(score, reference.laplacian_score(x, GRID))


def test_lgtm(x):
    r = int(48 * RATIO)
    plan = reference.lgtm_plan(x, GRID, STRIDE, r)
    theirs = published.lgtm_plan(x, GRID, RATIO, STRIDE)
    assert theirs.merged.shape == (2, r, 1)
    assert published.token_merge(x, theirs).shape == (2, 48 - r, 20)
    expected = reference.token_unmerge(reference.token_merge(x, plan), plan)
    assert_close(published.lgtm(x, GRID, RATIO, STRIDE), expected)


def test_pooling(x):
    assert_close(published.kv_downsample(x, GRID, 2, 0.9), reference.kv_downsample(x, GRID, (2, 2), 0.9))
    assert_close(published.todo_downsample(x, GRID, 2), reference.kv_downsample(x, GRID, (2, 2), 1.0))


def test_tomesd_merges_as_much(x):
    pytest.importorskip("tomesd")
    x = x.float()
    out = published.tomesd_lgtm(x, GRID, RATIO, STRIDE)
    assert out.shape == x.shape
    distinct = {tuple(row) for row in out[0].tolist()}
    assert len(distinct) == 48 - int(48 * RATIO)
