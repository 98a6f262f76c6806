"""How many launches the ops take and how many bytes these touch, taken down without running them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from bigain_kernels.testing import Inputs, samples
from bigain_kernels.triton_kernels import configs
from bigain_kernels.triton_kernels.launching import record_launches
from bigain_kernels.triton_kernels.machine_code import specialize
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
    match = "bipartite_match" if window < 0 else "match_near"
    assert names == ["laplacian_score", match, "merge_plan", "token_merge", "token_unmerge"]


def test_splitting_the_match_adds_no_launch(monkeypatch):
    monkeypatch.setattr(configs, "multiprocessors", lambda device: 132)
    launches = run_lgtm()
    tiles = launches[1].arguments
    rows_of_tiles = BATCH * -(-tiles["num_sources"] // tiles["BLOCK_M"])
    assert launches[1].grid[0] > rows_of_tiles
    assert len(launches) == 5


@pytest.mark.parametrize(("grid", "channels"), [(GRID, CHANNELS), ((32, 32), 1152), (GRID, 72)])
def test_one_binary_matches_every_batch(monkeypatch, grid, channels):
    """The grid of the launch differs, and nothing that Triton compiles for: constants or what it specializes."""
    monkeypatch.setattr(configs, "multiprocessors", lambda device: 132)
    n = grid[0] * grid[1]
    with record_launches() as launches:
        for batch in range(1, 17):
            x = meta(batch, n, channels)
            IMPLEMENTATIONS["lgtm_plan"](x, *grid, 2, 2, n // 2, -1, 1)
            IMPLEMENTATIONS["bipartite_match"](x, meta(batch, n // 4, dtype=torch.int32), -1, *grid, 2, 2)
    matches = [launch for launch in launches if launch.name in ("bipartite_match", "match_prepare")]
    options = ("num_warps", "num_stages")
    binaries = {repr([each.name, specialize(each), [each.arguments.get(o) for o in options]]) for each in matches}
    assert len(matches) == 3 * 16
    assert len({launch.grid for launch in matches}) > 16
    # The op prepares what the plan has from its score; both match with the same.
    assert len(binaries) == 2


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


# The samples of the ops on tokens of that size: by their names, the op and its flat arguments.
CALLS = samples(Inputs(torch.bfloat16, "meta", BATCH, GRID, CHANNELS, head_dim=64))
# How many launches a call takes, where it is not one.
LAUNCHES = {
    "bipartite_match": 3,
    "bipartite_match window": 3,
    "lgtm_plan": 3,
    "lgtm_plan window": 3,
    "lgtm_plan share": 3,
    "token_merge mlerp": 3,
    "token_merge_norm": 2,
    "token_merge_norm all": 2,
    "kv_downsample_attention text": 2,
}


@pytest.mark.parametrize("call", CALLS)
def test_launches_and_shapes_of_every_op(call):
    op, args = CALLS[call]
    with record_launches() as launches:
        results = IMPLEMENTATIONS[op](*args)
    assert len(launches) == LAUNCHES.get(call, 1)
    fakes = getattr(torch.ops.bigain, op)(*args)
    if isinstance(results, torch.Tensor):
        results, fakes = [results], [fakes]
    for result, fake in zip(results, fakes, strict=True):
        assert result.shape == fake.shape
        assert result.dtype == fake.dtype
        assert result.stride() == fake.stride()


def attend(grid, heads, d, factor=2, alpha=0.9, bias=False, text=0):
    """The launches of a call whose queries are the image tokens."""
    n = grid[0] * grid[1]
    q, k, v = (
        meta(BATCH, tokens, heads * d).unflatten(2, (heads, d)).transpose(1, 2) for tokens in (n, n + text, n + text)
    )
    keys = (grid[0] // factor) * (grid[1] // factor) + text
    key_bias = meta(1, keys, dtype=torch.float32) if bias else None
    with record_launches() as launches:
        out = IMPLEMENTATIONS["kv_downsample_attention"](
            q, k, v, *grid, factor, factor, alpha, None, None, key_bias, text, n + text
        )
    assert out.shape == q.shape
    assert out.transpose(1, 2).is_contiguous()
    return launches


def test_attention_pools_inside_where_launches_dominate():
    for text in (0, 77):
        (launch,) = attend((16, 16), 16, 72, text=text)
        assert launch.name == "kv_downsample_attention"
        assert (launch.arguments["SY"], launch.arguments["SX"]) == (2, 2)
        # q, k and v where they are, and the result: nothing is stored in between.
        tokens = 16 * 16 * 16 * 72 * BATCH * 2
        assert bytes_of(launch) == 4 * tokens + 2 * BATCH * text * 16 * 72 * 2


def test_attention_pools_before_where_windows_would_be_read_too_often():
    launches = attend(GRID, 5, 64)
    assert [launch.name for launch in launches] == ["kv_downsample"]  # then PyTorch's attention
    assert launches[0].arguments["TENSORS"] == 2
    # The heads lie side by side in memory: rows of 320 channels.
    assert launches[0].arguments["units_0"] * launches[0].arguments["UNIT"] == 320
    launches = attend(GRID, 5, 64, bias=True, text=7)
    assert [launch.name for launch in launches] == ["kv_downsample", "kv_downsample_attention"]
    assert (launches[1].arguments["SY"], launches[1].arguments["keys"]) == (1, 1024 + 7)
    # Nearest tokens alone are a quarter of the reads.
    assert [launch.name for launch in attend((32, 32), 5, 64, factor=2)] == ["kv_downsample_attention"]
    assert [launch.name for launch in attend((40, 40), 5, 64, factor=2)] == ["kv_downsample"]
    assert [launch.name for launch in attend((40, 40), 5, 64, factor=2, alpha=1.0)] == ["kv_downsample_attention"]


def test_attention_without_pooling():
    assert attend(GRID, 5, 64, factor=1) == []  # PyTorch's attention
    (launch,) = attend(GRID, 5, 64, factor=1, bias=True)
    assert (launch.name, launch.arguments["ALPHA"]) == ("kv_downsample_attention", "one")


def test_heads_too_wide_for_the_kernel():
    for bias in (False, True):
        assert [launch.name for launch in attend((8, 8), 2, 192, bias=bias)] == ["kv_downsample"]


@pytest.mark.parametrize(
    ("grid", "channels", "expected"), [(GRID, 320, "pooled_kv_projection"), (GRID, 1536, "kv_downsample")]
)
def test_projection_pools_inside_where_launches_dominate(grid, channels, expected):
    x, weight = meta(BATCH, grid[0] * grid[1], channels), meta(channels, channels)
    with record_launches() as launches:
        k, v = IMPLEMENTATIONS["pooled_kv_projection"](x, *grid, 2, 2, 0.9, None, weight, weight, None, None)
    assert [launch.name for launch in launches] == [expected]
    assert k.shape == v.shape == (BATCH, N // 4, channels)


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
        norm = (None, 1e-5, x.new_empty(shape[2]), x.new_empty(shape[2]), x[:, 0], x[:, 1])
        assert IMPLEMENTATIONS["token_merge_norm"](x, *tables, *norm).shape == (shape[0], 5, shape[2])
        assert IMPLEMENTATIONS["laplacian_score"](x, 3, 3, "l2").shape == shape[:2]
        assert IMPLEMENTATIONS["kv_downsample"]([x], 3, 3, 2, 2, 0.9, None)[0].shape == (shape[0], 1, shape[2])


def test_a_fused_norm_stores_no_normalized_tokens():
    """The statistics of the tokens, then the merge, which reads the tokens themselves."""
    x, tables = x_and_tables()
    with record_launches() as launches:
        IMPLEMENTATIONS["token_merge_norm"](x, *tables, None, 1e-6, x[0, 0], x[0, 1], x[:, 0], x[:, 1])
    statistics, merge = launches
    assert (statistics.name, merge.name) == ("row_stats", "token_merge")
    assert statistics.arguments["eps"] == 1e-6
    assert (merge.arguments["NORM"], merge.arguments["AFFINE"], merge.arguments["MODULATE"]) == (True, True, True)
    tokens = x.numel() * x.element_size()
    assert bytes_of(statistics) <= 1.05 * tokens
    assert bytes_of(merge) <= 1.1 * (tokens + BATCH * M * CHANNELS * 2)


def test_programs_for_huge_slots():
    """One for 16 channels of 4,096 members: programs of short slots take them on, unless these are fewer."""
    x, tables = x_and_tables()
    small = [meta(BATCH, width, dtype=torch.int32) for width in (300, 47, 300, 46)]  # slots of up to 255 members
    # All of 300 tokens in 9 slots.
    few = [meta(BATCH, width, dtype=torch.int32) for width in (300, 10, 300, 9)]
    with record_launches() as launches:
        IMPLEMENTATIONS["token_merge"](x, *tables, "mean", None)
        IMPLEMENTATIONS["token_merge"](x, *tables, "prune", None)
        IMPLEMENTATIONS["token_merge"](x[:, :300], *few, "mean", None)
        IMPLEMENTATIONS["token_merge"](x[:, :300], *small, "mlerp", None)
    mean, prune, fewer, *mlerp = launches
    blocks = -(-M // mean.arguments["BLOCK_M"])
    wide = mean.arguments["BLOCKS"]
    assert mean.arguments["spread"] == 4 * wide < blocks
    assert mean.grid == prune.grid == (-(-CHANNELS // (64 * wide)), blocks, BATCH)
    assert prune.arguments["spread"] == 0
    assert fewer.grid == (-(-CHANNELS // (64 * wide)), fewer.arguments["spread"], BATCH)
    assert fewer.arguments["spread"] > -(-9 // fewer.arguments["BLOCK_M"])
    assert [launch.name for launch in mlerp] == ["row_stats", "token_merge"]


def test_an_op_that_a_table_lacks_uses_the_fallback(monkeypatch):
    table = configs.table
    lacking = {**table("gfx942"), "ops": {}}
    monkeypatch.setattr(configs, "table", lambda name: lacking if name == "gfx942" else table(name))
    assert configs.candidates("token_merge", "gfx942") == configs.candidates("token_merge")
