"""FlopCounterMode over the ops: a multiplication and an addition are two operations, products of matrices count."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import bigain_kernels as bk
from bigain_kernels.declaration import OPS
from tests.shapes import tokens

pytestmark = pytest.mark.usefixtures("backend")

GRID = (5, 7)
X = tokens(4, 35, 12)
Q = tokens(4, 35, 12).unflatten(2, (3, 4)).transpose(1, 2)
W = X[0, :6]


def flops(call):
    # torch has no formula for its flash kernel on a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def pairs(window, stride=(2, 2)):
    """Sources and the destinations that they are compared with, one by one; the destinations are top left."""
    tiles_y, tiles_x = GRID[0] // stride[0], GRID[1] // stride[1]

    def tile(token):
        row, column = divmod(token, GRID[1])
        return min(row // stride[0], tiles_y - 1), min(column // stride[1], tiles_x - 1)

    destinations = [y * stride[0] * GRID[1] + x * stride[1] for y in range(tiles_y) for x in range(tiles_x)]
    return sum(
        window is None or max(abs(a - b) for a, b in zip(tile(source), tile(destination), strict=True)) <= window
        for source in set(range(35)) - set(destinations)
        for destination in destinations
    )


@pytest.mark.parametrize("window", [None, 0, 1, 2, 9])
def test_matching(window):
    score = bk.laplacian_score(X, GRID)
    destinations = bk.select_destinations(score, GRID, (2, 2))
    expected = 2 * 4 * pairs(window) * 12
    assert flops(lambda: bk.bipartite_match(X, destinations, window, GRID, (2, 2))) == expected
    assert flops(lambda: bk.lgtm_plan(X, GRID, 0.5, window=window)) == expected
    assert flops(lambda: bk.lgtm_plan(X, GRID, 0.5, window=window, share_plan=2)) == expected // 2
    assert flops(lambda: bk.tome_plan(X, GRID, 0.5, window=window)) == expected


def test_attention_counts_what_torch_counts_for_its_own_on_the_pooled_keys():
    k = Q[:, :, :6]
    plain = flops(lambda: F.scaled_dot_product_attention(Q, k, k))
    assert plain == 4 * 4 * 3 * 35 * 6 * 4
    assert flops(lambda: bk.kv_downsample_attention(Q, Q, Q, GRID, 2, 0.9)) == plain
    # 3 keys of text, and 2 x 2 windows of the other 32.
    with_text = flops(lambda: bk.kv_downsample_attention(Q, Q, Q, (4, 8), 2, 0.9, image_tokens=(1, 33)))
    assert with_text == 4 * 4 * 3 * 35 * (3 + 8) * 4
    bias = torch.zeros(4, 35)
    proportional = flops(lambda: bk.kv_downsample_attention(Q, Q, Q, (1, 35), 1, 1.0, key_bias=bias))
    assert proportional == flops(lambda: F.scaled_dot_product_attention(Q, Q, Q))


def test_projection_counts_two_linear_layers_on_the_pooled_tokens():
    pooled = bk.kv_downsample(X, GRID, 2, 0.9)
    expected = flops(lambda: (F.linear(pooled, W), F.linear(pooled, W[:4])))
    assert expected == 2 * 4 * 6 * 12 * (6 + 4)
    assert flops(lambda: bk.pooled_kv_projection(X, GRID, 2, 0.9, W, W[:4])) == expected


def test_what_is_no_product_of_matrices_counts_nothing():
    plan = bk.lgtm_plan(X, GRID, 0.5)
    score = bk.laplacian_score(X, GRID)
    assert flops(lambda: bk.laplacian_score(X, GRID)) == 0
    assert flops(lambda: bk.abm_plan(X, GRID, 0.5)) == 0
    assert flops(lambda: bk.token_unmerge(bk.token_merge(X, plan, "mlerp", score + 1), plan, X, X[:, 0])) == 0
    assert flops(lambda: bk.token_merge(X, plan, norm_eps=1e-5)) == 0
    assert flops(lambda: bk.kv_downsample(X, GRID, 2, 0.9)) == 0


def test_every_op_has_a_formula():
    assert {getattr(torch.ops.bigain, op) for op in OPS} <= set(flop_registry)


def test_under_inference_mode_and_with_gradients():
    for context in (torch.inference_mode(), torch.enable_grad()):
        with context:
            x = X.clone().requires_grad_(torch.is_grad_enabled())
            assert flops(lambda x=x: bk.lgtm_plan(x, GRID, 0.5)) == 2 * 4 * pairs(None) * 12


def test_formulas_are_there_for_who_only_asked_for_the_counter_before():
    code = """
import importlib.util, sys
import bigain_kernels as bk, torch
assert "torch.utils.flop_counter" not in sys.modules
importlib.util.find_spec("torch.utils.flop_counter")
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    bk.bipartite_match(torch.ones(1, 4, 3), torch.zeros(1, 1, dtype=torch.int32))
print(counter.get_total_flops(), sum(type(each).__name__ == "_AfterImport" for each in sys.meta_path))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == [str(2 * 3 * 3), "0"]
