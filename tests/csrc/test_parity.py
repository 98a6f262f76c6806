"""The CPU kernels against the float64 reference: every shape, dtype, layout and channel count."""

from __future__ import annotations

import pytest
import torch

import bigain_kernels as bk
from bigain_kernels import reference
from bigain_kernels.testing import SIMILARITY_TOLERANCE, assert_close, assert_match_is_best
from tests.shapes import DTYPES, GRIDS, tokens

pytestmark = [
    pytest.mark.usefixtures("cpp"),
    pytest.mark.parametrize("strided", [False, True]),
    pytest.mark.parametrize("channels", [1, 7, 72, 320]),
    pytest.mark.parametrize("dtype", DTYPES),
    pytest.mark.parametrize(("grid", "stride"), GRIDS),
]
BATCH = 3


@pytest.fixture
def x(grid, dtype, channels, strided):
    return tokens(BATCH, grid[0] * grid[1], channels, dtype, seed=channels, strided=strided)


@pytest.fixture(autouse=True)
def _on_cpp():
    with bk.use_backend("cpp"):
        yield


def assert_same_plan(actual, expected):
    for table in ("slot", "offsets", "members", "anchor"):
        assert torch.equal(getattr(actual, table), getattr(expected, table)), table


def matched(x, grid, stride):
    """Scores, destinations and matches of the float64 reference, as the ops return them."""
    score = reference.laplacian_score(x.double(), grid)
    destinations = reference.select_destinations(score, grid, stride)
    return score, destinations, *reference.bipartite_match(x.double(), destinations)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_laplacian_score(x, grid, stride, norm):
    score = bk.laplacian_score(x, grid, norm)
    assert_close(score, reference.laplacian_score(x.double(), grid, norm), torch.float32)
    rounded = score.round()  # ties
    rounded[:, ::3] = torch.nan
    for values in (score, rounded):
        expected = reference.select_destinations(values, grid, stride)
        assert torch.equal(bk.select_destinations(values, grid, stride), expected)


def test_bipartite_match(x, grid, stride):
    destinations = matched(x, grid, stride)[1]
    x[0, 0], x[1, -1], x[2, x.shape[1] // 2] = 0, torch.nan, torch.inf
    similarity, match = bk.bipartite_match(x, destinations)
    if destinations.shape[1] == 0:
        assert (similarity == -torch.inf).all()
        assert torch.equal(match, torch.arange(x.shape[1], dtype=torch.int32).expand_as(match))
    else:
        assert_match_is_best(x, destinations, similarity, match)


@pytest.mark.parametrize("window", [0, 1, 3])
def test_bipartite_match_in_a_window(x, grid, stride, window):
    destinations = matched(x, grid, stride)[1]
    if destinations.shape[1] == 0:
        return
    x[0, 0] = 0
    similarity, match = bk.bipartite_match(x, destinations, window=window, grid=grid, stride=stride)
    expected, expected_match = reference.bipartite_match(x.double(), destinations, window, grid, stride)
    assert torch.equal(similarity == -torch.inf, expected == -torch.inf)
    error = (similarity - expected).where(expected > -torch.inf, torch.zeros(())).abs()
    assert error.max() <= SIMILARITY_TOLERANCE
    # Where the matches differ, both destinations must be equally similar in float64.
    batch, token = (match != expected_match).nonzero(as_tuple=True)
    source = x[batch, token].double()
    cosines = [
        torch.cosine_similarity(source, x[batch, chosen[batch, token].long()].double(), dim=1)
        for chosen in (match, expected_match)
    ]
    assert ((cosines[0] - cosines[1]).abs() <= SIMILARITY_TOLERANCE).all()


def test_merge_plan(x, grid, stride):
    _, destinations, similarity, match = matched(x, grid, stride)
    sources = x.shape[1] - destinations.shape[1] if destinations.shape[1] else 0
    tied = similarity.mul(3).round().div(3)
    tied[0, ::5] = torch.nan
    for values in (similarity, tied):
        for r in {0, sources // 3, max(sources - 1, 0), sources}:
            assert_same_plan(
                bk.merge_plan(values, match, destinations, r, grid),
                reference.merge_plan(values, match, destinations, r, grid),
            )


@pytest.mark.parametrize("reduce", ["max", "sum", "mean", "min", "std"])
def test_block_merge_plan(x, grid, stride, reduce):
    score = matched(x, grid, stride)[0]
    tied = score.round()
    tied[1, ::4] = torch.nan
    for values in (score, tied):
        for r in (0, x.shape[1] // 2, x.shape[1]):
            assert_same_plan(
                bk.block_merge_plan(values, grid, stride, r, reduce),
                reference.block_merge_plan(values, grid, stride, r, reduce),
            )


@pytest.mark.parametrize("rows", [1, 3])
def test_merge_and_unmerge(x, grid, stride, dtype, rows):
    n, channels = x.shape[1:]
    plan = bk.lgtm_plan(x[:rows].float(), grid, 0.9 * bk.max_ratio(grid, stride), stride)
    weights = tokens(BATCH, n, 1, seed=8)[..., 0].abs() + 0.1
    for mode in ("mean", "mlerp", "prune"):
        assert_close(bk.token_merge(x, plan, mode=mode), reference.token_merge(x.double(), plan, mode))
    for mode in ("mean", "mlerp"):
        for kind in (torch.float32, torch.bfloat16):
            merged = bk.token_merge(x, plan, mode=mode, weights=weights.to(kind))
            assert_close(merged, reference.token_merge(x.double(), plan, mode, weights.to(kind).double()))
    y = tokens(BATCH, plan.num_slots, channels, dtype, seed=9, strided=not x.is_contiguous())
    gate = tokens(BATCH, 1, channels, dtype, seed=10)[:, 0]
    assert torch.equal(bk.token_unmerge(y, plan), reference.token_unmerge(y, plan))
    for residual in (x, x.float(), None):
        for scale in (gate, gate.float(), None):
            actual = bk.token_unmerge(y, plan, residual=residual, gate=scale)
            wide = [t if t is None else t.double() for t in (residual, scale)]
            assert_close(actual, reference.token_unmerge(y.double(), plan, *wide), dtype)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("operands", [(), ("norm_weight", "norm_bias"), ("scale", "shift"), "all"])
def test_merge_of_normalized_tokens(x, grid, stride, dtype, rows, operands):
    n, channels = x.shape[1:]
    plan = bk.lgtm_plan(x[:rows].float(), grid, 0.9 * bk.max_ratio(grid, stride), stride)
    weights = tokens(BATCH, n, 1, seed=8)[..., 0].abs() + 0.1
    weight, bias = tokens(2, 1, channels, dtype, seed=10)[:, 0]
    scale, shift = tokens(BATCH, 2, channels, dtype, seed=11, strided=True).unbind(1)
    given = {"norm_weight": weight, "norm_bias": bias, "scale": scale, "shift": shift}
    given = {name: tensor for name, tensor in given.items() if operands == "all" or name in operands}
    wide = {name: tensor.double() for name, tensor in given.items()}
    for w in (None, weights, weights.bfloat16()):
        merged = bk.token_merge(x, plan, weights=w, norm_eps=1e-3, **given)
        wide_w = w if w is None else w.double()
        assert_close(merged, reference.token_merge(x.double(), plan, "mean", wide_w, norm_eps=1e-3, **wide))


@pytest.mark.parametrize("alpha", [-0.5, 0.9, 1.0, "rows"])
def test_kv_downsample(x, grid, stride, alpha):
    factor = (min(stride[0], grid[0]), min(stride[1], grid[1]))
    weight = torch.tensor([0.9, -0.2, 1.0]) if alpha == "rows" else alpha
    other = tokens(BATCH, x.shape[1], 5, seed=3)
    pooled = bk.kv_downsample((x, other), grid, factor, weight)
    for actual, source in zip(pooled, (x, other), strict=True):
        assert_close(actual, reference.kv_downsample(source.double(), grid, factor, weight))
