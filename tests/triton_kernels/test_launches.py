"""How many launches the ops take and how many bytes these touch, taken down without running them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from bigain_kernels.aot import record_launches
from bigain_kernels.triton_kernels import configs
from bigain_kernels.triton_kernels.registration import IMPLEMENTATIONS

BATCH, GRID, CHANNELS = 2, (64, 64), 320
N = GRID[0] * GRID[1]
R = int(0.7 * N)
M = N - R


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def bytes_of(launch):
    """Bytes of the different tensors that a launch is given: what it moves if it touches each element once."""
    tensors = {id(value): value for value in launch.arguments.values() if isinstance(value, torch.Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def run_lgtm(window=-1, share=1):
    x = meta(BATCH, N, CHANNELS)
    with record_launches() as launches:
        tables = IMPLEMENTATIONS["lgtm_plan"](x, *GRID, 2, 2, R, window, share)
        y = IMPLEMENTATIONS["token_merge"](x, *tables, "mean", None)
        out = IMPLEMENTATIONS["token_unmerge"](y, *tables, x, None)
    assert y.shape == (BATCH, M, CHANNELS)
    assert out.shape == x.shape
    return launches


@pytest.mark.parametrize("share", [1, 2])
@pytest.mark.parametrize("window", [-1, 1])
def test_lgtm_is_five_launches(window, share):
    names = [launch.name for launch in run_lgtm(window, share)]
    assert names == ["laplacian_score", "bipartite_match", "merge_plan", "token_merge", "token_unmerge"]


def test_splitting_the_match_adds_no_launch(monkeypatch):
    monkeypatch.setattr(configs, "multiprocessors", lambda device: 132)
    launches = run_lgtm()
    assert launches[1].arguments["SPLIT"] > 1
    assert len(launches) == 5


def test_lgtm_moves_little_more_than_the_tokens():
    score, _, plan, merge, unmerge = (bytes_of(launch) for launch in run_lgtm())
    tokens = BATCH * N * CHANNELS * 2
    merged = BATCH * M * CHANNELS * 2
    assert score <= 1.05 * tokens
    assert merge <= 1.05 * (tokens + merged)
    assert unmerge <= 1.05 * (2 * tokens + merged)
    assert plan <= 64 * BATCH * N


def x_and_tables():
    tables = [meta(BATCH, width, dtype=torch.int32) for width in (N, M + 1, N, M)]
    return meta(BATCH, N, CHANNELS), tables


def calls():
    x, tables = x_and_tables()
    score, match = meta(BATCH, N, dtype=torch.float32), meta(BATCH, N, dtype=torch.int32)
    destinations = meta(BATCH, N // 4, dtype=torch.int32)
    alphas = meta(BATCH, dtype=torch.float32)
    return {
        "laplacian_score": ((x, *GRID, "l1"), 1),
        "select_destinations": ((score, *GRID, 2, 2), 1),
        "bipartite_match": ((x, destinations, -1, 1, 1, 1, 1), 2),
        "merge_plan": ((score, match, destinations, R), 1),
        "block_merge_plan": ((score, *GRID, 2, 2, R, "max"), 1),
        "lgtm_plan": ((x, *GRID, 2, 2, R, -1, 1), 3),
        "token_merge": ((x, *tables, "mlerp", None), 2),
        "token_unmerge": ((x[:, :M], *tables, x, x[:, 0]), 1),
        "kv_downsample": (([x, x, x, x], *GRID, 2, 2, 0.0, alphas), 1),
    }


@pytest.mark.parametrize("op", list(IMPLEMENTATIONS))
def test_launches_and_shapes_of_every_op(op):
    args, expected = calls()[op]
    with record_launches() as launches:
        results = IMPLEMENTATIONS[op](*args)
    assert len(launches) == expected
    fakes = getattr(torch.ops.bigain, op)(*args)
    if isinstance(results, torch.Tensor):
        results, fakes = [results], [fakes]
    for result, fake in zip(results, fakes, strict=True):
        assert result.shape == fake.shape
        assert result.dtype == fake.dtype
        assert result.is_contiguous()


def test_longer_lists_take_a_launch_for_every_four():
    x, _ = x_and_tables()
    with record_launches() as launches:
        IMPLEMENTATIONS["kv_downsample"]([x] * 9, *GRID, 2, 2, 0.9, None)
    assert len(launches) == 3


@pytest.mark.parametrize("shape", [(0, 9, 8), (2, 9, 0)])
def test_empty_tensors(shape):
    x = meta(*shape)
    with record_launches():
        tables = IMPLEMENTATIONS["lgtm_plan"](x, 3, 3, 2, 2, 4, -1, 1)
        assert IMPLEMENTATIONS["token_merge"](x, *tables, "mean", None).shape == (shape[0], 5, shape[2])
        assert IMPLEMENTATIONS["laplacian_score"](x, 3, 3, "l2").shape == shape[:2]
        assert IMPLEMENTATIONS["kv_downsample"]([x], 3, 3, 2, 2, 0.9, None)[0].shape == (shape[0], 1, shape[2])
