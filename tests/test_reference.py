"""The reference against definitions written out as loops over single tokens."""

from __future__ import annotations

import math

import pytest
import torch

import bigain_kernels as bk
from bigain_kernels.testing import assert_close, assert_is_partition, assert_match_is_best
from tests.shapes import DTYPES, GRIDS, tokens


def naive_score(x, grid, norm):
    height, width = grid
    out = torch.zeros(x.shape[:2], dtype=torch.float64)
    for b in range(x.shape[0]):
        for row in range(height):
            for column in range(width):
                response = 4 * x[b, row * width + column].double()
                for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                    if 0 <= r < height and 0 <= c < width:
                        response = response - x[b, r * width + c].double()
                out[b, row * width + column] = response.norm(p=1 if norm == "l1" else 2)
    return out


def naive_tiles(grid, stride):
    (height, width), (sy, sx) = grid, stride
    for tile_y in range(height // sy):
        for tile_x in range(width // sx):
            yield [(tile_y * sy + i) * width + tile_x * sx + j for i in range(sy) for j in range(sx)]


@pytest.mark.parametrize(("grid", "stride"), GRIDS)
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_score_is_the_norm_of_the_laplacian(grid, stride, norm, dtype):
    x = tokens(2, grid[0] * grid[1], 5, dtype, strided=True)
    score = bk.laplacian_score(x, grid, norm)
    assert score.dtype == torch.float32
    assert_close(score, naive_score(x, grid, norm), torch.float32)


@pytest.mark.parametrize(("grid", "stride"), GRIDS)
def test_destinations_are_the_smoothest_tokens_of_their_tiles(grid, stride):
    score = torch.rand(3, grid[0] * grid[1], generator=torch.Generator().manual_seed(1)).mul(6).round()  # many ties
    chosen = bk.select_destinations(score, grid, stride)
    for b in range(3):
        expected = sorted(min(tile, key=lambda n: (score[b, n].item(), n)) for tile in naive_tiles(grid, stride))
        assert chosen[b].tolist() == expected


def test_nan_scores_are_chosen_last():
    score = torch.tensor([[torch.nan, 3.0, torch.nan, torch.nan, 2.0, torch.nan, torch.nan, torch.nan]])
    # Tile 0 holds tokens 0, 1, 4, 5; tile 1 holds 2, 3, 6, 7, all NaN, so its first token is taken.
    assert bk.select_destinations(score, (2, 4), (2, 2)).tolist() == [[2, 4]]


@pytest.mark.parametrize(("grid", "stride"), GRIDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_are_the_most_similar_destinations(grid, stride, dtype):
    x = tokens(3, grid[0] * grid[1], 7, dtype, strided=True)
    destinations = bk.select_destinations(bk.laplacian_score(x, grid), grid, stride)
    similarity, match = bk.bipartite_match(x, destinations)
    if destinations.shape[1] == 0:
        assert (similarity == -torch.inf).all()
        assert match.tolist() == [list(range(x.shape[1]))] * 3
    else:
        assert_match_is_best(x, destinations, similarity, match)


@pytest.mark.parametrize("window", [0, 1, 2, 50])
@pytest.mark.parametrize(("grid", "stride"), [((8, 10), (2, 2)), ((7, 11), (3, 2))])
def test_window_compares_only_with_near_tiles(grid, stride, window):
    x = tokens(2, grid[0] * grid[1], 6, torch.float64)
    destinations = bk.select_destinations(bk.laplacian_score(x, grid), grid, stride)
    similarity, match = bk.bipartite_match(x, destinations, window=window, grid=grid, stride=stride)
    unit = x / x.norm(dim=-1, keepdim=True)
    last = (grid[0] // stride[0] - 1, grid[1] // stride[1] - 1)

    def tile(n):
        return min(n // grid[1] // stride[0], last[0]), min(n % grid[1] // stride[1], last[1])

    for b in range(2):
        chosen = destinations[b].tolist()
        for n in set(range(x.shape[1])) - set(chosen):
            near = [d for d in chosen if max(abs(tile(n)[0] - tile(d)[0]), abs(tile(n)[1] - tile(d)[1])) <= window]
            cosine = [unit[b, n].dot(unit[b, d]).item() for d in near]
            assert match[b, n].item() == near[cosine.index(max(cosine))]
            assert similarity[b, n].item() == pytest.approx(max(cosine), abs=1e-6)


@pytest.mark.parametrize(("grid", "stride"), GRIDS)
@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_plan_merges_the_best_matched_sources(grid, stride, fraction):
    n = grid[0] * grid[1]
    x = tokens(2, n, 4)
    destinations = bk.select_destinations(bk.laplacian_score(x, grid), grid, stride)
    similarity, match = bk.bipartite_match(x, destinations)
    similarity = similarity.mul(4).round().div(4)  # ties
    count = n - destinations.shape[1] if destinations.shape[1] else 0
    r = int(fraction * count)
    plan = bk.merge_plan(similarity, match, destinations, r, grid)
    assert plan.num_slots == n - r
    assert_is_partition(plan)
    for b in range(2):
        sources = [t for t in range(n) if t not in destinations[b].tolist()]
        merged = set(sorted(sources, key=lambda t: (-similarity[b, t].item(), t))[:r])
        assert plan.assign()[b].tolist() == [match[b, t].item() if t in merged else t for t in range(n)]


def test_r_is_clipped_to_the_number_of_sources():
    x = tokens(1, 16, 4)
    destinations = bk.select_destinations(bk.laplacian_score(x, (4, 4)), (4, 4), (2, 2))
    similarity, match = bk.bipartite_match(x, destinations)
    assert bk.merge_plan(similarity, match, destinations, 10**6, (4, 4)).num_slots == 4
    nothing = destinations[:, :0].contiguous()
    similarity, match = bk.bipartite_match(x, nothing)
    assert bk.merge_plan(similarity, match, nothing, 5, (4, 4)).num_slots == 16


@pytest.mark.parametrize(("grid", "stride"), GRIDS)
@pytest.mark.parametrize("reduce", ["max", "sum", "mean", "min", "std"])
@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
def test_block_plan_merges_the_smoothest_tiles_whole(grid, stride, reduce, fraction):
    n = grid[0] * grid[1]
    score = torch.rand(2, n, generator=torch.Generator().manual_seed(2))
    r = int(fraction * n)
    plan = bk.block_merge_plan(score, grid, stride, r, reduce)
    assert_is_partition(plan)
    rule = {
        "max": max,
        "min": min,
        "sum": sum,
        "mean": lambda v: sum(v) / len(v),
        "std": lambda v: math.sqrt(sum((a - sum(v) / len(v)) ** 2 for a in v) / len(v)),
    }[reduce]
    for b in range(2):
        tiles = list(naive_tiles(grid, stride))
        count = r // (stride[0] * stride[1] - 1) if stride != (1, 1) else 0
        order = sorted(range(len(tiles)), key=lambda t: (rule([score[b, n].item() for n in tiles[t]]), t))
        expected = list(range(n))
        for t in order[:count]:
            for token in tiles[t]:
                expected[token] = tiles[t][0]
        assert plan.assign()[b].tolist() == expected


@pytest.mark.parametrize("mode", ["mean", "mlerp", "prune"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_merge_and_unmerge_follow_the_plan(mode, dtype, rows):
    grid = (6, 7)
    x = tokens(4, 42, 5, dtype, strided=True)
    plan = bk.lgtm_plan(x[:rows].float(), grid, 0.6)
    merged = bk.token_merge(x, plan, mode=mode)
    assert merged.dtype == dtype
    expected = torch.zeros(4, plan.num_slots, 5, dtype=torch.float64)
    for b in range(4):
        for slot in range(plan.num_slots):
            p = b % rows
            inside = plan.members[p, plan.offsets[p, slot] : plan.offsets[p, slot + 1]].long()
            value = x[b, inside].double().mean(0)
            if mode == "mlerp":
                value = value / value.norm() * x[b, inside].double().norm(dim=-1).max()
            if mode == "prune":
                value = x[b, plan.anchor[p, slot]].double()
            expected[b, slot] = value
    assert_close(merged, expected)
    residual, gate = tokens(4, 42, 5, dtype, seed=1), tokens(4, 1, 5, dtype, seed=2)[:, 0]
    y = tokens(4, plan.num_slots, 5, dtype, seed=3)
    back = torch.stack([y[b, plan.slot[b % rows].long()] for b in range(4)])
    assert torch.equal(bk.token_unmerge(y, plan), back)
    whole = back.double() * gate.double()[:, None] + residual.double()
    assert_close(bk.token_unmerge(y, plan, residual=residual, gate=gate), whole)
    assert_close(bk.token_unmerge(y, plan, gate=gate), back.double() * gate.double()[:, None])


def test_weights_weigh_the_mean():
    x, weights = tokens(2, 12, 3), torch.rand(2, 12, generator=torch.Generator().manual_seed(4)) + 0.1
    plan = bk.lgtm_plan(x, (3, 4), 0.5)
    merged = bk.token_merge(x, plan, weights=weights)
    for b in range(2):
        for slot in range(plan.num_slots):
            inside = plan.members[b, plan.offsets[b, slot] : plan.offsets[b, slot + 1]].long()
            w = weights[b, inside].double()[:, None]
            assert_close(merged[b, slot], (x[b, inside].double() * w).sum(0) / w.sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [-0.5, 0.0, 0.5, 0.9, 1.0, 1.3, "rows"])
@pytest.mark.parametrize(
    ("grid", "factor"), [((8, 8), 2), ((7, 9), 2), ((9, 9), 3), ((10, 13), (2, 1)), ((9, 14), 4), ((1, 8), (1, 2))]
)
def test_downsampling_blends_nearest_and_average(grid, factor, alpha, dtype):
    (height, width), (sy, sx) = grid, factor if isinstance(factor, tuple) else (factor, factor)
    x = tokens(2, height * width, 3, dtype, strided=True)
    weight = torch.tensor([0.9, -0.2]) if alpha == "rows" else alpha
    out = bk.kv_downsample(x, grid, factor, weight)
    out_y, out_x = height // sy, width // sx
    expected = torch.zeros(2, out_y * out_x, 3, dtype=torch.float64)
    for b in range(2):
        a = float(weight[b]) if alpha == "rows" else alpha
        for i in range(out_y):
            for j in range(out_x):
                row, column = int((i + 0.5) * height / out_y), int((j + 0.5) * width / out_x)
                window = [(i * sy + p) * width + j * sx + q for p in range(sy) for q in range(sx)]
                nearest, average = x[b, row * width + column].double(), x[b, window].double().mean(0)
                expected[b, i * out_x + j] = a * nearest + (1 - a) * average
    assert_close(out, expected)


def test_downsampling_several_tensors_is_the_same_as_one_by_one():
    k, v = tokens(2, 24, 3), tokens(2, 24, 5, seed=1)
    pooled = bk.kv_downsample((k, v), (4, 6), 2, 0.9)
    assert torch.equal(pooled[0], bk.kv_downsample(k, (4, 6), 2, 0.9))
    assert torch.equal(pooled[1], bk.kv_downsample(v, (4, 6), 2, 0.9))


def test_pooling_commutes_with_a_linear_layer():
    layer, x = torch.nn.Linear(6, 4).double(), tokens(2, 24, 6, torch.float64)
    assert_close(bk.kv_downsample(layer(x), (4, 6), 2, 1.3), layer(bk.kv_downsample(x, (4, 6), 2, 1.3)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_attention_is_softmax_over_pooled_keys(dtype):
    grid, factor, alpha, scale = (4, 6), (2, 3), 0.9, 0.3
    q, k, v = (tokens(2, 24, 8, dtype, seed=s).unflatten(2, (2, 4)).transpose(1, 2) for s in range(3))
    bias = tokens(2, 4, 1, dtype, seed=5)[..., 0]
    out = bk.kv_downsample_attention(q, k, v, grid, factor, alpha, scale=scale, key_bias=bias)
    pooled = [
        torch.stack([bk.kv_downsample(t[:, h].double(), grid, factor, alpha) for h in range(2)], 1) for t in (k, v)
    ]
    weights = (scale * q.double() @ pooled[0].transpose(-1, -2) + bias.double()[:, None, None]).softmax(-1)
    assert_close(out, weights @ pooled[1])
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert_close(bk.kv_downsample_attention(q, k, v, grid, 1, 1.0), plain)
