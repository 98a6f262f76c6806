from __future__ import annotations

import json

import pytest
import torch

from bigain_kernels.triton_kernels import configs, tune

SHAPES = [(1, (4, 6), 64, 2), (2, (6, 4), 64, 1)]


def small(table):
    """The table with two tiny candidates per op: every program runs in Python here."""
    keep = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_T": 16, "BLOCK_C": 64, "BLOCK": 64, "TOKENS": 16, "VECTORS": 128}
    ops = {}
    for op, entry in table["ops"].items():
        first = {name: min(value, keep.get(name, value)) for name, value in entry["candidates"][0].items()}
        ops[op] = {"candidates": [first, {**first, "num_warps": 1}], "choice": {"small": 0, "large": 0}}
    return {**table, "ops": ops}


def test_the_fastest_candidate_is_chosen_and_the_rest_is_kept():
    table = small(configs.table("sm_90"))
    seen = []

    def measure(call):
        call()
        seen.append(call)
        return 2.0 if len(seen) % 2 else 1.0  # the second candidate of every pair is faster

    tuned = tune.tune(table, "cpu", "a note", SHAPES, measure)
    assert tuned["tuned"] is True
    assert tuned["note"] == "a note"
    measured = set(tune.calls(torch.randn(1, 24, 64).bfloat16(), (4, 6), 2))
    measured |= {"bipartite_match_fp32", "attention_fp32", "pooled_kv_projection_fp32"}
    assert measured <= set(tuned["ops"])
    for op, entry in tuned["ops"].items():
        assert entry["choice"] == {"small": 1 if op in measured else 0, "large": 0}, op
        assert entry["candidates"] == table["ops"][op]["candidates"]
    assert tuned["routes"]["pooled_kv_projection"] == {"small": "pooled", "large": "pooled"}
    assert table["routes"]["pooled_kv_projection"]["small"] == "fused", "the argument was changed"
    assert table["ops"]["token_merge"]["choice"]["small"] == 0, "the argument was changed"
    assert json.loads(tune.dump(tuned)) == tuned


def test_a_candidate_with_other_bits_stops_the_run():
    x = torch.randn(1, 24, 64)
    answers = iter([x, x, x + 1])
    with pytest.raises(RuntimeError, match=r"token_merge: config .* gives other bits"):
        tune.times(
            "token_merge", [{"BLOCK_M": 16}, {"BLOCK_M": 32}, {"BLOCK_M": 64}], lambda: next(answers), lambda call: 1.0
        )
