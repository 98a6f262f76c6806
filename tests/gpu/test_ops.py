"""Every op on the GPU, through the public API, against the reference in float64."""

from __future__ import annotations

import pytest
import torch

import bigain_kernels as bk
from bigain_kernels.testing import assert_close, assert_is_partition, assert_match_is_best
from tests.shapes import GRIDS, tokens

from .device import BACKENDS, DEVICE, DTYPES, MODEL_SHAPES, random_tokens

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
SMALL = [(3, grid, stride, channels) for grid, stride in GRIDS for channels in (64, 72)]
SMALL_IDS = [f"{g[0]}x{g[1]}-{s[0]}x{s[1]}-C{c}" for _, g, s, c in SMALL]


def reference(function, *args, **kwargs):
    """The public function on the reference."""
    with bk.use_backend("reference"):
        return function(*args, **kwargs)


def strided(batch, n, channels, dtype, seed=0):
    """A slice with real strides on the device."""
    whole = tokens(batch, n + 3, 2 * channels + 5, dtype, seed).to(DEVICE)
    return whole[:, 2 : n + 2, 3 : channels + 3]


def check_planning(x, grid, stride):
    """Scores, destinations, matches and plans of x, each against the reference given the same inputs."""
    wide = x.double()
    score = bk.laplacian_score(x, grid)
    assert_close(score, reference(bk.laplacian_score, wide, grid), torch.float32)
    destinations = bk.select_destinations(score, grid, stride)
    assert torch.equal(destinations, reference(bk.select_destinations, score, grid, stride))
    similarity, match = bk.bipartite_match(x, destinations)
    if destinations.shape[1]:
        for b in range(x.shape[0]):
            row = slice(b, b + 1)
            assert_match_is_best(x[row], destinations[row], similarity[row], match[row])
    n, d = x.shape[1], destinations.shape[1]
    for r in {0, (n - d) // 2, n - d} if d else {0}:
        plan = bk.merge_plan(similarity, match, destinations, r, grid)
        expected = reference(bk.merge_plan, similarity, match, destinations, r, grid)
        for name in ("slot", "offsets", "members", "anchor"):
            assert torch.equal(getattr(plan, name), getattr(expected, name)), name
        # The chain in one op scores, matches and selects alike.
        ratio = (r + 0.5) / n
        chain = bk.lgtm_plan(x, grid, min(ratio, bk.max_ratio(grid, stride)), stride)
        assert torch.equal(chain.slot, plan.slot)
    return plan


def check_moving(x, plan):
    """Merging and unmerging x by a plan, in every mode."""
    wide = x.double()
    weights = torch.rand(x.shape[:2], generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE) + 0.5
    for mode in ("mean", "mlerp", "prune"):
        assert_close(bk.token_merge(x, plan, mode), reference(bk.token_merge, wide, plan, mode))
    for mode in ("mean", "mlerp"):
        y = bk.token_merge(x, plan, mode, weights)
        assert_close(y, reference(bk.token_merge, wide, plan, mode, weights.double()))
    batch, _, channels = x.shape
    weight, bias = random_tokens(2, 1, channels, x.dtype, 2)[:, 0]
    scale, shift = random_tokens(batch, 2, channels, x.dtype, 3).unbind(1)
    affine, modulation = {"norm_weight": weight, "norm_bias": bias}, {"scale": scale, "shift": shift}
    for operands in ({}, affine, modulation, affine | modulation):
        y = bk.token_merge(x, plan, weights=weights, norm_eps=1e-3, **operands)
        others = {name: tensor.double() for name, tensor in operands.items()}
        expected = reference(bk.token_merge, wide, plan, weights=weights.double(), norm_eps=1e-3, **others)
        assert_close(y, expected)
    y = bk.token_merge(x, plan)
    for residual, gate in ((None, None), (x, None), (None, x[:, 0]), (x, x[:, 0])):
        others = [None if t is None else t.double() for t in (residual, gate)]
        out = bk.token_unmerge(y, plan, residual, gate)
        assert_close(out, reference(bk.token_unmerge, y.double(), plan, *others))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "grid", "stride", "channels"), SMALL, ids=SMALL_IDS)
def test_small_grids(backend, batch, grid, stride, channels, dtype):
    x = strided(batch, grid[0] * grid[1], channels, dtype)
    with bk.use_backend(backend):
        plan = check_planning(x, grid, stride)
        assert_is_partition(plan.to("cpu"))
        check_moving(x, plan)
        score = bk.laplacian_score(x, grid, "l2")
        assert_close(score, reference(bk.laplacian_score, x.double(), grid, "l2"), torch.float32)
        for reduce in ("max", "min"):
            plan = bk.block_merge_plan(score, grid, stride, grid[0] * grid[1] // 2, reduce)
            expected = reference(bk.block_merge_plan, score, grid, stride, grid[0] * grid[1] // 2, reduce)
            assert torch.equal(plan.members, expected.members)


@pytest.mark.parametrize("shape", MODEL_SHAPES)
def test_shapes_of_models(backend, shape):
    batch, grid, channels = MODEL_SHAPES[shape]
    x = random_tokens(batch, grid[0] * grid[1], channels, torch.bfloat16)
    with bk.use_backend(backend):
        check_moving(x, check_planning(x, grid, (2, 2)))
        pooled = bk.kv_downsample((x, x), grid, 2, 0.9)
        assert_close(pooled[1], reference(bk.kv_downsample, x.double(), grid, 2, 0.9))


@pytest.mark.parametrize("window", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_window(backend, dtype, window):
    grid, stride = (20, 22), (2, 2)
    x = strided(2, 440, 64, dtype)
    with bk.use_backend(backend):
        destinations = bk.select_destinations(bk.laplacian_score(x, grid), grid, stride)
        similarity, match = bk.bipartite_match(x, destinations, window=window, grid=grid, stride=stride)
    expected = reference(bk.bipartite_match, x.double(), destinations, window=window, grid=grid, stride=stride)
    torch.testing.assert_close(similarity, expected[0], rtol=0, atol=4e-6)
    assert (match == expected[1]).float().mean() > 0.999


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0, 1.3, "rows"])
@pytest.mark.parametrize(("grid", "factor"), [((8, 8), 2), ((7, 9), 2), ((9, 14), (4, 3)), ((11, 11), 5), ((3, 5), 1)])
def test_kv_downsample(backend, grid, factor, alpha, dtype):
    xs = [strided(3, grid[0] * grid[1], channels, dtype, channels) for channels in (64, 72, 8)]
    weight = torch.tensor([0.0, 1.0, 0.7], device=DEVICE) if alpha == "rows" else alpha
    with bk.use_backend(backend):
        pooled = bk.kv_downsample(xs, grid, factor, weight)
    for x, y in zip(xs, pooled, strict=True):
        assert_close(y, reference(bk.kv_downsample, x.double(), grid, factor, weight))


@pytest.mark.parametrize("value", [0.25, 0.0, torch.nan, torch.inf])
def test_tokens_all_alike(backend, value):
    """One destination attracts every source that merges: 2,867 members in one slot."""
    x = torch.full((1, 4096, 320), value, dtype=torch.bfloat16, device=DEVICE)
    with bk.use_backend(backend):
        plan = bk.lgtm_plan(x, (64, 64), 0.7)
        y = bk.token_merge(x, plan)
    expected = reference(bk.lgtm_plan, x, (64, 64), 0.7)
    assert torch.equal(plan.slot, expected.slot)
    assert_close(y, x[:, : plan.num_slots])


def test_tokens_all_alike_are_normalized_alike(backend):
    x = random_tokens(1, 1, 320, torch.bfloat16).expand(1, 4096, 320)
    shift = torch.zeros(1, 320, device=DEVICE)
    with bk.use_backend(backend):
        plan = bk.lgtm_plan(x, (64, 64), 0.7)
        y = bk.token_merge(x, plan, norm_eps=1e-5, scale=shift + 1, shift=shift)
    expected = 2 * torch.nn.functional.layer_norm(x[:, : plan.num_slots].double(), (320,))
    assert_close(y, expected)


def test_shared_plans(backend):
    x = random_tokens(6, 1024, 320, torch.bfloat16)
    with bk.use_backend(backend):
        plan = bk.lgtm_plan(x, (32, 32), 0.6, share_plan=2)
        assert plan.num_rows == 3
        check_moving(x, plan)
        mean = x.float().unflatten(0, (2, 3)).mean(0).bfloat16()
        assert torch.equal(plan.slot, bk.lgtm_plan(mean, (32, 32), 0.6).slot)


def test_empty_batches(backend):
    x = torch.empty(0, 64, 32, device=DEVICE)
    with bk.use_backend(backend):
        plan = bk.lgtm_plan(x, (8, 8), 0.5)
        assert bk.token_unmerge(bk.token_merge(x, plan), plan, residual=x).shape == x.shape
        assert bk.kv_downsample(x, (8, 8), 2, 0.9).shape == (0, 16, 32)
