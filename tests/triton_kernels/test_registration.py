"""The Triton backend as `backends` and `torch.ops.bigain` see it, on a machine without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bigain_kernels import (
    backends,
    kv_downsample,
    laplacian_score,
    methods,
    reference,
    token_merge,
    token_unmerge,
    use_backend,
)

pytest.importorskip("triton")

from bigain_kernels.declaration import OPS
from bigain_kernels.triton_kernels import configs
from bigain_kernels.triton_kernels.aot import ARCHITECTURES
from bigain_kernels.triton_kernels.launching import record_launches
from bigain_kernels.triton_kernels.registration import IMPLEMENTATIONS, TILE
from tests.shapes import tokens


@pytest.fixture
def on_cpu():
    """The backend "triton" as if it took CPU tensors: what it refuses can be seen without a GPU."""
    with backends.registered(backends.get("triton")._replace(devices=("cpu",), priority=100)):
        yield


def test_every_op_is_registered_for_cuda():
    assert set(OPS) == set(IMPLEMENTATIONS)
    for op in OPS:
        with use_backend("triton"):
            assert backends.choose(op, "cuda").backend == "triton"
            with pytest.raises(backends.BackendUnavailable, match=f"no implementation of {op} for cpu"):
                backends.choose(op, "cpu")


def test_float64_goes_to_the_next_backend(on_cpu):
    x = tokens(1, 12, 8, torch.float64)
    assert backends.choose("laplacian_score", "cpu").backend == "triton"
    torch.testing.assert_close(laplacian_score(x, (3, 4)), reference.laplacian_score(x, (3, 4)))
    with use_backend("triton"), pytest.raises(backends.BackendUnavailable, match="does not compute in float64"):
        laplacian_score(x, (3, 4))


def test_float64_operands_of_a_norm_go_to_the_next_backend(on_cpu):
    x, row = tokens(1, 12, 8), torch.ones(8, dtype=torch.float64)
    with use_backend("reference"):
        plan = methods.lgtm_plan(x, (3, 4), 0.5)
    norm = {"norm_eps": 1e-5, "norm_weight": row, "norm_bias": row}
    torch.testing.assert_close(token_merge(x, plan, **norm), reference.token_merge(x, plan, **norm))
    with use_backend("triton"), pytest.raises(backends.BackendUnavailable, match="does not compute in float64"):
        token_merge(x, plan, **norm)


@pytest.mark.parametrize("other", ["cpu", "cuda:1"])
def test_tensors_on_two_devices_are_refused(other):
    """Kernels get addresses: that one leads nowhere would not be seen before they run."""
    with FakeTensorMode():
        x = torch.empty(1, 12, 8, device="cuda:0")
        tables = [torch.empty(1, width, dtype=torch.int32, device="cuda:0") for width in (12, 7, 12, 6)]
        refuses = backends.get("triton").refuses
        assert refuses("token_merge", (x, *tables, "mean", None)) == ""
        tables[2] = tables[2].to(other)
        assert refuses("token_merge", (x, *tables, "mean", None)) == f"takes tensors of one device, got one on {other}"


def test_long_rows_go_to_the_next_backend(on_cpu):
    call = torch.zeros(1, 65_537), torch.zeros(1, 65_537, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    expected = reference.merge_plan(*call, 5, (1, 65_537))
    assert torch.equal(torch.ops.bigain.merge_plan(*call, 5)[0], expected.slot)
    with use_backend("triton"), pytest.raises(backends.BackendUnavailable, match="at most 65536 tokens, got 65537"):
        torch.ops.bigain.merge_plan(*call, 5)


@pytest.mark.parametrize("shape", [(16_384, 1, 2), (1, 1_000_001, 1)])
def test_what_no_grid_of_programs_holds_goes_to_the_next_backend(on_cpu, shape):
    x = tokens(*shape)
    grid = (1, shape[1])
    torch.testing.assert_close(laplacian_score(x, grid), reference.laplacian_score(x, grid))
    with (
        use_backend("triton"),
        pytest.raises(backends.BackendUnavailable, match="at most 16383 rows of 1000000 tokens"),
    ):
        laplacian_score(x, grid)


def of_shape(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


LISTS = {"few": of_shape(64, 15_000, dtype=torch.int32), "many": of_shape(64, 250_000, dtype=torch.int32)}
# Calls at a limit, one on each side: what they launch, and what past it is refused.
LIMITS = {
    "frames": (
        ("laplacian_score", (of_shape(8191, 128, 64), 4, 4, "l1", 8)),
        ("laplacian_score", (of_shape(16_383, 128, 64), 4, 4, "l1", 8)),
        "at most 65535 frames, got 16383 rows of 8",
    ),
    "frames of few rows": (
        ("laplacian_score", (of_shape(3, 320_000, 64), 4, 4, "l1", 20_000)),
        ("laplacian_score", (of_shape(4, 320_000, 64), 4, 4, "l1", 20_000)),
        "at most 65535 frames, got 4 rows of 20000",
    ),
    "rows of a grid": (
        ("laplacian_score", (of_shape(1, 262_140, 4096), 131_070, 2, "l1", 1)),
        ("laplacian_score", (of_shape(1, 262_142, 4096), 131_071, 2, "l1", 1)),
        "at most 131070 rows, got 131071",
    ),
    "rows of tiles": (
        ("lgtm_plan", (of_shape(1, 65_535, 64), 65_535, 1, 1, 1, 0, -1, 1)),
        ("lgtm_plan", (of_shape(1, 65_536, 64), 65_536, 1, 1, 1, 0, -1, 1)),
        "at most 65535 rows of tiles, got 65536",
    ),
    "large tiles": (
        ("lgtm_plan", (of_shape(1, 16_384, 64), 128, 128, 128, 128, 9, -1, 1)),
        ("lgtm_plan", (of_shape(1, 65_536, 64), 256, 256, 256, 256, 9, -1, 1)),
        "at most 32768 scores, got 65536",
    ),
    "scores": (
        ("select_destinations", (of_shape(1, 32_768, dtype=torch.float32), 2, 16_384, 2, 2)),
        ("select_destinations", (of_shape(1, 980_000, dtype=torch.float32), 700, 1400, 700, 3)),
        "at most 32768 scores, got 2097152",
    ),
    "tiles of similarities": (
        ("bipartite_match", (of_shape(64, 1_000_000, 8), LISTS["few"], -1, 1, 1, 1, 1)),
        ("bipartite_match", (of_shape(64, 1_000_000, 8), LISTS["many"], -1, 1, 1, 1, 1)),
        "got 64 rows of 750000 by 250000",
    ),
    "tokens": (
        ("bipartite_match", (of_shape(2147, 1_000_000, 8), of_shape(2147, 1, dtype=torch.int32), -1, 1, 1, 1, 1)),
        ("bipartite_match", (of_shape(2148, 1_000_000, 8), of_shape(2148, 1, dtype=torch.int32), -1, 1, 1, 1, 1)),
        "at most 2147483647 tokens, got 2148 rows of 1000000",
    ),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_what_launches_cannot_hold_is_refused(limit):
    (op, taken), (_, refused), why = LIMITS[limit]
    refuses = backends.get("triton").refuses
    assert refuses(op, taken) == ""
    assert why in refuses(op, refused)
    with record_launches() as launches:
        IMPLEMENTATIONS[op](*taken)
    assert launches
    for launch in launches:
        columns, *others = launch.grid
        assert columns < 2**31
        assert all(count <= 65_535 for count in others), launch.name


def test_no_config_has_smaller_tiles_than_are_counted():
    tiles = [
        config
        for architecture in ARCHITECTURES
        for op in ("bipartite_match", "bipartite_match_narrow", "bipartite_match_fp32", "bipartite_match_window")
        for config in configs.candidates(op, architecture)
    ]
    assert min(config["BLOCK_M"] for config in tiles) >= TILE[0]
    assert min(config["BLOCK_N"] for config in tiles) >= TILE[1]


@pytest.mark.parametrize("share", [1, 2])
def test_lgtm_plan_op_is_the_method(share):
    x = tokens(4, 63, 16)
    args = (x, 7, 9, 2, 2, 30, -1, share)
    tables = torch.ops.bigain.lgtm_plan(*args)
    with use_backend("reference"):
        plan = methods.lgtm_plan(x, (7, 9), 30.5 / 63, share_plan=share)
    for table, name in zip(tables, ("slot", "offsets", "members", "anchor"), strict=True):
        assert torch.equal(table, getattr(plan, name))
    torch.library.opcheck(torch.ops.bigain.lgtm_plan.default, args)


def test_fake_cuda_tensors_are_traced():
    with FakeTensorMode():
        x = torch.empty(2, 64, 32, dtype=torch.bfloat16, device="cuda")
        slot, offsets, members, anchor = torch.ops.bigain.lgtm_plan(x, 8, 8, 2, 2, 40, -1, 1)
        y = torch.ops.bigain.token_merge(x, slot, offsets, members, anchor, "mean", None)
        out = torch.ops.bigain.token_unmerge(y, slot, offsets, members, anchor, x, None)
        tables = (slot, offsets, members, anchor)
        normed = torch.ops.bigain.token_merge_norm(x, *tables, None, 1e-5, None, None, x.select(1, 0), x.select(1, 1))
    assert y.shape == normed.shape == (2, 24, 32)
    assert out.shape == x.shape
    assert out.device.type == "cuda"


class Layer(torch.nn.Module):
    def forward(self, x):
        plan = methods.lgtm_plan(x, (8, 8), 0.6)
        k, v = kv_downsample((x, x), (8, 8), 2, 0.9)
        normed = token_merge(x, plan, norm_eps=1e-6, scale=x.select(1, 0), shift=x.select(1, 1))
        return token_unmerge(token_merge(x, plan), plan, residual=x), normed, k, v


class Launching(torch.fx.Interpreter):
    """Runs a graph with the launchers in the place of the ops."""

    def call_function(self, target, args, kwargs):
        name = getattr(target, "_opname", None)
        return IMPLEMENTATIONS[name](*args, **kwargs) if name in OPS else super().call_function(target, args, kwargs)


def test_export_for_a_gpu_without_one(tmp_path):
    """A program exported, saved and loaded for CUDA on a machine that has none: it holds the ops themselves, for any
    batch, and with their arguments the kernels are launched that a GPU would get. Its numbers are tested on a GPU."""
    with FakeTensorMode():
        x = torch.empty(4, 64, 32, dtype=torch.bfloat16, device="cuda")
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(Layer(), (x,), dynamic_shapes={"x": {0: batch}})
    program._example_inputs = None  # fake tensors cannot be saved
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2")
    names = [str(n.target) for n in loaded.graph.nodes if str(n.target).startswith("bigain.")]
    ops = ["lgtm_plan", "token_merge", "token_merge_norm", "token_unmerge", "kv_downsample"]
    assert sorted(names) == sorted(f"bigain.{op}.default" for op in ops)
    with FakeTensorMode():
        fakes = loaded.module()(torch.empty(6, 64, 32, dtype=torch.bfloat16, device="cuda"))
    with record_launches() as launches:
        results = Launching(loaded.graph_module).run(torch.empty(6, 64, 32, dtype=torch.bfloat16, device="meta"))
    planning, norm = ["laplacian_score", "bipartite_match", "merge_plan"], ["row_stats", "token_merge"]
    expected = [*planning, *norm, "token_merge", "token_unmerge", "kv_downsample"]
    assert sorted(launch.name for launch in launches) == sorted(expected)
    for fake, result in zip(fakes, results, strict=True):
        assert fake.device.type == "cuda"
        assert (fake.shape, fake.dtype) == (result.shape, result.dtype)
