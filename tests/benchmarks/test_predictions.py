"""Measured over predicted: which launches a benchmark takes, and what is left out."""

from __future__ import annotations

import pytest

from benchmarks import predictions
from benchmarks.problems import PROBLEMS

ROWS = [
    {"shape": "sd2_512", "op": "lgtm_plan", "kernel": "laplacian_score", "predicted": 4.0},
    {"shape": "sd2_512", "op": "lgtm_plan", "kernel": "bipartite_match", "predicted": 10.0},
    {"shape": "sd2_512", "op": "token_merge", "kernel": "token_merge", "predicted": 5.0},
    {"shape": "sd2_512", "op": "token_merge_norm", "kernel": "token_merge", "predicted": 7.0},
    {"shape": "flux_1024", "op": "token_merge", "kernel": "token_merge", "predicted": 9.0},
]


def test_a_benchmark_takes_its_launches():
    assert predictions.predicted(ROWS, "lgtm_plan", "sd2_512") == 19.0
    assert predictions.predicted(ROWS, "bipartite_match", "sd2_512") == 10.0
    assert predictions.predicted(ROWS, "token_merge", "flux_1024") == 9.0
    assert predictions.predicted(ROWS, "attention", "sd2_512") == 0


def test_ratios_are_of_the_triton_kernels_in_bfloat16():
    row = {"op": "token_merge", "problem": "sd2_512", "dtype": "bfloat16", "mode": "graph", "median_us": "10.0"}
    measured = [{**row, "provider": "triton"}, {**row, "provider": "cuda"}]
    measured.append({**row, "provider": "triton", "dtype": "float32"})
    _, *lines = predictions.compare(measured, ROWS)
    assert [line.split() for line in lines] == [["token_merge", "sd2_512", "graph", "10.0", "5.0", "2.00"]]


def test_shapes_are_called_as_the_problems():
    pytest.importorskip("triton")
    from bigain_kernels.triton_kernels.report.capture import SHAPES

    for shape in SHAPES:
        problem = PROBLEMS[shape.name]
        assert (shape.batch, shape.grid, shape.channels, shape.heads) == problem[1:5]
